"""A folder that appears under its name only when everything in it is there."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from stem_jax.errors import InputError


def check_absent(folder: Path, flag: str) -> None:
    """Raises InputError if the folder exists."""
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{flag}={folder} exists; choose a new folder, or remove that one first")


@contextlib.contextmanager
def new_folder(folder: Path, flag: str) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to it at the end; removed on an error.

    Args:
        flag: where the name came from, for messages.

    Raises:
        InputError: the folder exists, cannot be created, or the disk is full.
    """
    check_absent(folder, flag)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = folder.parent / f".{folder.name}.{os.getpid()}.part"
        made.mkdir()
    except OSError as error:
        raise InputError(
            f"{flag}={folder} cannot be created ({error.strerror}); choose another folder"
        ) from error
    try:
        yield made
        check_absent(folder, flag)
        made.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"no space left for {flag}={folder}; free some, or choose another folder"
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
