"""What is being written lies beside its name, and is gone if it does not get it."""

import contextlib
import errno
import os
import re
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from stem_jax.errors import InputError
from stem_jax.lock import Lock

_PART, _LOCK = ".part", ".lock"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def unfinished(target: Path, where: str, make: Callable[[Path], None]) -> Iterator[Path]:
    """A temporary file or folder beside `target`, gone at the end unless it was renamed.

    A lock beside it says that its writer lives. What dead writers left is removed first.
    """
    with exit_on_sigterm(f"{where} was not written"):
        _make_parent(target, where)
        made, lock = None, None
        try:
            with refused_writes(where):
                _remove_abandoned(target)
                made, lock = _locked_name(target)
                make(made)
            with refused_writes(where, _FULL):
                yield made
        finally:
            if made is not None and lock is not None:
                with _undisturbed():
                    remove(made)
                    lock.release()


def _make_parent(target: Path, where: str) -> None:
    try:
        there = next((parent for parent in target.parents if parent.exists()), None)
        if there is not None and not there.is_dir():
            raise InputError(
                f"{where} cannot be created: {there} is not a folder; choose another folder"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{where} cannot be created ({error.strerror}); choose another folder"
        ) from error


def _locked_name(target: Path) -> tuple[Path, Lock]:
    """A name beside `target` that nobody has, and a lock that says so."""
    while True:
        made = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_PART}")
        # One who looks for what the dead left may hold it for a moment.
        if (lock := Lock.take(_lock_of(made))) is not None:
            return made, lock


def _remove_abandoned(target: Path) -> None:
    """What writers of this name left who were killed: their locks can be taken.

    A folder that one of them had moved away to replace it comes back.
    """
    start = f".{target.name}."
    pattern = re.compile(rf"({re.escape(start)}[0-9a-f]{{8}}{re.escape(_PART)}){re.escape(_LOCK)}")
    # Before each whole write all names of the folder are read, so that no more is done with most.
    for name in os.listdir(target.parent):
        if not name.startswith(start) or (match := pattern.fullmatch(name)) is None:
            continue
        path = target.with_name(name)
        # Another user's stays; so does what this one may not remove.
        with contextlib.suppress(OSError):
            if (lock := Lock.take(path)) is None:
                continue
            with lock:
                made = path.with_name(match[1])
                if moved_away(made).exists() and not target.exists():
                    moved_away(made).rename(target)
                remove(moved_away(made))
                remove(made)


def _lock_of(made: Path) -> Path:
    return made.with_name(made.name + _LOCK)


def moved_away(made: Path) -> Path:
    """Where the folder that is replaced lies for a moment."""
    return made.with_name(made.name + "-old")


@contextlib.contextmanager
def refused_writes(where: str, numbers: tuple[int, ...] = ()) -> Iterator[None]:
    """Errors of the file system, all or those of some numbers, as an InputError."""
    try:
        yield
    except OSError as error:
        if numbers and error.errno not in numbers:
            raise
        reason, remedy = error.strerror, "choose another place"
        if error.errno in _FULL:
            reason, remedy = "no space left", "free some, or choose another place"
        raise InputError(f"{where} cannot be written ({reason}); {remedy}") from error


def remove(path: Path) -> None:
    """Removes a file or a folder with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def exit_on_sigterm(consequence: str) -> Iterator[None]:
    """SIGTERM says what follows and raises SystemExit, so that what was begun is removed.

    Only where it would kill the process: a training has its own way to stop.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or not _kills(signal.SIGTERM):
        yield
        return

    def leave(number, _) -> None:
        # A second one must not end the removal.
        signal.signal(number, signal.SIG_IGN)
        print(f"error: stopped by SIGTERM; {consequence}", file=sys.stderr)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _kills(number: int) -> bool:
    """Whether a signal has no handler, not even one that Python does not know.

    Between several processes JAX hears SIGTERM with one of C++, which Python would replace for
    good.
    """
    if signal.getsignal(number) is not signal.SIG_DFL:
        return False
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        # Not Linux: what Python knows must do.
        return True
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is None or not int(caught[1], 16) >> (number - 1) & 1


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C is heard at the end: what is removed meanwhile is gone."""
    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    # A handler of C stays, which Python cannot set again; and what is ignored is so here.
    foreign = before is None or (before is signal.SIG_DFL and not _kills(signal.SIGINT))
    if not main or foreign or before is signal.SIG_IGN:
        yield
        return
    heard: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if heard:
            signal.raise_signal(signal.SIGINT)
