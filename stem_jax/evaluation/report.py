"""Results on the disk: a file is there whole, or not at all."""

import json
import os
from pathlib import Path
from typing import Any

from stem_jax.agreement import is_first
from stem_jax.errors import InputError


def check_out(out: str | Path) -> None:
    """Asks before a long evaluation whether its results can be written to `out`.

    Raises:
        InputError: `out` is a folder, or its folder cannot be made.
    """
    out = Path(out)
    if out.is_dir():
        raise InputError(f"--out={out} is a folder; give the name of a JSON file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out={out}: {error.strerror}; choose another place") from error


def write_json(out: str | Path, record: dict[str, Any]) -> None:
    """Writes the record in process 0; what is not JSON's own is written as its text.

    Raises:
        InputError: the file cannot be written.
    """
    if not is_first():
        return
    out = Path(out)
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(json.dumps(record, indent=2, default=str) + "\n", "utf-8")
        temporary.replace(out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"--out={out}: {error.strerror}; choose another place") from error
