"""Results on the disk: a file is there whole, or not at all."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stem_jax.agreement import is_first
from stem_jax.errors import InputError


def check_out(out: str | Path, *beside: Path) -> None:
    """Asks before a long evaluation whether its results can be written to `out`.

    Args:
        beside: other files of its folder that are going to be written.

    Raises:
        InputError: one of them is a folder, or their folder cannot be made or written to.
    """
    out = Path(out)
    if out.is_dir():
        raise InputError(f"--out={out} is a folder; give the name of a JSON file")
    for path in beside:
        if path.is_dir():
            raise InputError(
                f"--out={out} puts {path.name} beside it, where a folder is; rename one"
            )
    probe = _temporary(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Permissions do not tell: root, read-only disks and access lists have their own rules.
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out={out}: {error.strerror}; choose another place") from error


def write_json(out: str | Path, record: dict[str, Any]) -> None:
    """Writes the record in process 0; what is not JSON's own is written as its text.

    Raises:
        InputError: the file cannot be written.
    """
    write_whole(out, (json.dumps(record, indent=2, default=str) + "\n").encode())


def write_whole(path: str | Path, content: bytes) -> None:
    """Writes a file in process 0.

    Raises:
        InputError: the file cannot be written.
    """
    if not is_first():
        return
    path = Path(path)
    temporary = _temporary(path)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: {error.strerror}; choose another --out") from error


@contextlib.contextmanager
def stdout_kept() -> Iterator[None]:
    """Whatever is written to stdout meanwhile goes to stderr, also what libraries in C++ write."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")
