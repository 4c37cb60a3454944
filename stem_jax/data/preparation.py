"""The making of stores in a folder: beside what is there, one at a time, resumed after a kill.

Everything lies in FOLDER/.prepare until it is whole:

    job.json        what it is made from; another job in its place begins anew
    pieces/         documents that are tokenized but not yet in the stores
    progress.json   how much of the pieces is in the stores
    new/            what FOLDER shall hold: train, validation, tokenizer, ...
    complete        new/ is whole; from here on it only moves
    old/            what FOLDER held
    cleared         FOLDER holds nothing any more of what new/ replaces

Then it takes its place. FOLDER has no store while parts of two could be mixed: train/, which makes
a folder a store, leaves first and comes last. Whoever prepares next ends a move that was cut.
"""

import contextlib
import errno
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

from stem_jax.data.token_store import META_FILE
from stem_jax.errors import BadRecord, InputError
from stem_jax.files import read_json, sync_all, write_whole
from stem_jax.lock import Lock

TOKENIZER = "tokenizer"
SKIPPED = "skipped.jsonl"
RECORD = "source.json"
# In the order in which they leave; they come in the reverse one.
_REPLACED = ("train", "validation", RECORD, SKIPPED, TOKENIZER)
# Left alone unless there is a new one.
_MAY_STAY = {TOKENIZER}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_WAIT_SECONDS = 1.0
_GOES_ON = "the same command goes on where this one was"
_WORK, _LOCK = ".prepare", ".prepare.lock"


def remove_unfinished(folders: Iterable[Path], chosen: Callable[[Any], bool]) -> None:
    """Removes what dead processes left of jobs that nobody can go on with.

    chosen: whether a job, as its job.json has it, is one.
    """
    for folder in folders:
        if (folder / _WORK).is_dir() and not (folder / _WORK / "complete").exists():
            # Somebody else may remove it at the same time; what is in it keeps it.
            with contextlib.suppress(OSError):
                with Lock.take(folder / _LOCK) or contextlib.nullcontext() as lock:
                    if lock is not None and chosen(_job_in(folder / _WORK)):
                        shutil.rmtree(folder / _WORK, ignore_errors=True)
                folder.rmdir()


def is_unfinished(folder: Path) -> bool:
    """Whether stores are being made in a folder, or were when it was stopped."""
    return (folder / _WORK).is_dir()


def unfinished_job(folder: Path) -> Any:
    """What the stores are made from that are being made in a folder; None if there are none."""
    return _job_in(folder / _WORK) if is_unfinished(folder) else None


def _job_in(work: Path) -> Any:
    try:
        return read_json(work / "job.json")
    except InputError:
        return None


class Preparation:
    """Holds the lock of a folder while stores are made in it; use it as a context manager.

    Leaving it by a signal, a full disk, a bad record or a failed process keeps what was done for
    the same job; any other error, such as input that is refused, removes it.

    folder: where the stores shall be. work: for what is not whole yet. new: what shall be moved.
    finished: the same job was complete, and had but to be moved.
    """

    def __init__(self, folder: str | Path, job: dict[str, Any] | None, *, wait: bool = False):
        """job: what the result is a function of; None: not resumed.

        wait: for another process that prepares in this folder, rather than refuse it.
        """
        self.folder = Path(folder)
        self.work = self.folder / _WORK
        self.new = self.work / "new"
        self.finished = False
        # As it is read back.
        self._job = json.loads(json.dumps(job))
        self._wait = wait
        self._lock: Lock | None = None

    def __enter__(self) -> Self:
        self._made_folder = not self.folder.exists()
        try:
            self._lock = self._locked()
        except OSError as error:
            if self.folder.exists() and not self.folder.is_dir():
                raise InputError(
                    f"{self.folder} is a file, no folder: give the name of a folder"
                ) from error
            raise InputError(
                f"folder {self.folder} cannot be written ({error.strerror}): choose another one"
            ) from error
        try:
            self._check_replaceable()
            self._begin()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        # Whoever writes whole files has made an InputError of it.
        full = any(getattr(e, "errno", None) in _FULL for e in (error, error and error.__cause__))
        refused = isinstance(error, InputError) and not isinstance(error, BadRecord) and not full
        kept = self._job is not None and error is not None and not refused
        if kept and isinstance(error, KeyboardInterrupt):
            # Whoever ends the process says it.
            error.args = error.args or (self.consequence,)
        try:
            if not kept:
                self._discard()
        finally:
            self._end()
        if full:
            hint = f", and {_GOES_ON}" if kept else ""
            raise InputError(f"no space left for {self.folder}: free some{hint}") from error

    @property
    def pieces(self) -> Path:
        return self.work / "pieces"

    @property
    def consequence(self) -> str:
        """What follows if it is stopped, for messages."""
        return f"{self.folder} was not written" if self._job is None else _GOES_ON

    @property
    def _discarded(self) -> Path:
        return self.folder / ".prepare.old"

    @property
    def progress(self) -> Path:
        return self.work / "progress.json"

    def publish(self) -> None:
        """Puts everything in `new` into the folder, in place of what an earlier one put there."""
        sync_all(self.new)
        self._mark("complete")
        self._move()

    def _locked(self) -> Lock:
        path = self.folder / _LOCK
        told = False
        while (lock := self._taken(path)) is None:
            holder = Lock.holder(path)
            if not self._wait:
                raise InputError(
                    f"{holder} prepares text in {self.folder}: wait for it, or write elsewhere"
                )
            if not told:
                print(f"waiting for {holder}, which prepares {self.folder}", file=sys.stderr)
                told = True
            time.sleep(_WAIT_SECONDS)
        return lock

    def _taken(self, path: Path) -> Lock | None:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                return Lock.take(path)
            except FileNotFoundError:
                # Who had it has removed the empty folder in this moment.
                continue

    def _end(self) -> None:
        if self._lock is not None:
            self._lock.release()
        if self._made_folder:
            # What is in it keeps it, such as the lock of one who waited.
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def _check_replaceable(self) -> None:
        """Raises InputError for what has a name of ours and is another's."""
        if (self.work / "complete").exists():
            # A move was cut: what is there are parts of our stores.
            return
        for name in ("train", "validation"):
            there = self.folder / name
            if there.exists() and not (there / META_FILE).is_file():
                raise InputError(
                    f"folder {there} exists and is no token store: remove it or write elsewhere"
                )
        stores = (self.folder / "train").exists()
        for name, is_ours in ((RECORD, _is_record), (SKIPPED, _is_list)):
            there = self.folder / name
            if there.exists() and not (stores and is_ours(there)):
                raise InputError(
                    f"{there} exists and is not of a token store: it would be replaced; move it "
                    "away, or write elsewhere"
                )

    def _begin(self) -> None:
        """Ends a move that was cut, then goes on with the same job or clears another's remains."""
        shutil.rmtree(self._discarded, ignore_errors=True)
        found = _job_in(self.work)
        if (self.work / "complete").exists():
            self._move()
            self.finished = self._job is not None and found == self._job
        elif self._job is None or found != self._job:
            self._discard()
        if self.finished:
            return
        self.new.mkdir(parents=True, exist_ok=True)
        self.pieces.mkdir(exist_ok=True)
        if self._job is not None:
            write_whole(self.work / "job.json", json.dumps(self._job, indent=2) + "\n")

    def _mark(self, name: str) -> None:
        write_whole(self.work / name, "")

    def _move(self) -> None:
        old = self.work / "old"
        if not (self.work / "cleared").exists():
            old.mkdir(exist_ok=True)
            for name in _REPLACED:
                there = self.folder / name
                if there.exists() and (name not in _MAY_STAY or (self.new / name).exists()):
                    there.rename(old / name)
            self._mark("cleared")
        for name in reversed(_REPLACED):
            if (self.new / name).exists():
                (self.new / name).rename(self.folder / name)
        self._discard()

    def _discard(self) -> None:
        # Renamed first: what is half removed is not taken for what is half done.
        if self.work.exists():
            self.work.rename(self._discarded)
        shutil.rmtree(self._discarded, ignore_errors=True)


def _is_record(path: Path) -> bool:
    """Whether a file says what stores were made from."""
    try:
        record = read_json(path)
    except InputError:
        return False
    return isinstance(record, dict) and {"source", "fingerprint"} <= record.keys()


def _is_list(path: Path) -> bool:
    """Whether a file lists records that were left out."""
    try:
        with path.open(encoding="utf-8") as lines:
            return all(json.loads(line).keys() == {"place", "reason"} for line in lines)
    except (OSError, ValueError, AttributeError):
        return False
