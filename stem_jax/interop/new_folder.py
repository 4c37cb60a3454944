"""A folder that appears under its name only when everything in it is there."""

import contextlib
import errno
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from stem_jax.errors import InputError


def check_absent(folder: Path, flag: str) -> None:
    """Raises InputError if the folder exists."""
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{flag}={folder} exists; choose a new folder, or remove that one first")


@contextlib.contextmanager
def new_folder(folder: Path, flag: str) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to it at the end; removed on an error or SIGTERM.

    Args:
        flag: where the name came from, for messages.

    Raises:
        InputError: the folder exists, cannot be created, or the disk is full.
    """
    check_absent(folder, flag)
    with _exit_on_sigterm():
        made = _make(folder, flag)
        try:
            yield made
            _sync_all(made)
            check_absent(folder, flag)
            made.rename(folder)
            _sync(folder.parent)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f"no space left for {flag}={folder}; free some, or choose another folder"
            ) from error
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _make(folder: Path, flag: str) -> Path:
    there = next((parent for parent in folder.parents if parent.exists()), None)
    if there is not None and not there.is_dir():
        raise InputError(
            f"{flag}={folder} cannot be created: {there} is not a folder; choose another folder"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent)
        # A temporary folder is for its owner alone; this one will be a folder like others.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(made, 0o777 & ~mask)
    except OSError as error:
        raise InputError(
            f"{flag}={folder} cannot be created ({error.strerror}); choose another folder"
        ) from error
    return Path(made)


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit meanwhile, so that what was begun is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number, _) -> None:
        # A second one must not end the removal.
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        # None is a handler that was not set by Python, and that Python cannot set again.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _sync_all(folder: Path) -> None:
    """Everything in a folder is on the disk before the folder has its name."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
