"""Results on the disk: a file is there whole, or not at all."""

import json
from pathlib import Path
from typing import Any

from stem_jax.checkpoints.files import check_outside
from stem_jax.errors import InputError
from stem_jax.files import check_writable, write_whole
from stem_jax.processes.agreement import is_first


def check_out(out: str | Path, *beside: Path) -> None:
    """Asks before a long evaluation whether its results can be written to `out`.

    Args:
        beside: other files of its folder that are going to be written.

    Raises:
        InputError: one of them is a folder, or their folder cannot be made or written to.
    """
    check_outside(out, "--out")
    check_writable(out, "--out")
    for path in beside:
        if path.is_dir():
            raise InputError(
                f"--out={out} puts {path.name} beside it, where a folder is; rename one"
            )
        check_writable(path, "--out")


def write_json(out: str | Path, record: dict[str, Any]) -> None:
    """Writes the record in process 0; what is not JSON's own is written as its text.

    Raises:
        InputError: the file cannot be written.
    """
    write_result(out, json.dumps(record, indent=2, default=str) + "\n")


def write_result(path: str | Path, content: str | bytes) -> None:
    """Writes a file in process 0.

    Raises:
        InputError: the file cannot be written.
    """
    if is_first():
        write_whole(path, content, "--out")
