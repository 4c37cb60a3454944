"""A process of a run tells where it is: its account of time, kept in the run's folder."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from stem_jax.errors import InputError, ToldToStop
from stem_jax.goodput.account import RESTART, START, Account
from stem_jax.goodput.gauges import gauges_path, gauges_text, write_gauges
from stem_jax.goodput.start_record import (
    FAILED,
    STOPPED,
    RecordFile,
    StartRecord,
    boot,
    read_starts,
    record_path,
)

# Between two files for Prometheus, and two records without a step.
_GAUGES_SECONDS = 1.0
_RECORD_SECONDS = 1.0
# How much the last step counts in what is usual.
_WEIGHT = 0.1


class Progress:
    """What the loop tells; without a folder nothing is kept.

    account: of the main thread's time.
    """

    def __init__(self, account: Account | None = None):
        self.account = account or Account()
        self.part = self.account.part
        self._saving: int | None = None

    def began(self, step: int, steps: int, tokens_per_step: int) -> None:
        """The loop begins after a step, of so many steps of the run."""

    def step_done(self, step: int, loss: float, seconds: float) -> None:
        """A step was awaited; seconds: since the one before, without what came between."""
        self.account.started()

    def beat(self) -> None:
        """All is well."""

    def long(self, name: str) -> contextlib.AbstractContextManager[None]:
        """As `part`, of what takes as long as it takes."""
        return self.part(name)

    def save_begun(self, step: int) -> None:
        """Its checkpoint is on its way."""
        self._saving = step

    def save_ended(self) -> None:
        """Whatever was begun to be saved is on the disk."""
        self._saving = None

    def ended(self, end: str) -> None:
        """COMPLETE or STOPPED."""


class KeptProgress(Progress):
    """Writes a record at every step, and the file for Prometheus at most once a second."""

    def __init__(self, workdir: Path, process: int, processes: int, began: float):
        """began: of the process, by the monotonic clock."""
        path = record_path(workdir, process)
        self._before, now = read_starts(path), boot()
        if self._before and (self._before[-1].pid, self._before[-1].boot) == (os.getpid(), now):
            # It goes on in the same process, whose time until then is counted.
            began = max(began, self._before[-1].until_clock)
        super().__init__(Account(began, RESTART if self._before else START))
        self._record = StartRecord(
            process=process,
            processes=processes,
            host=socket.gethostname(),
            pid=os.getpid(),
            boot=now,
            began_clock=began,
            began_time=time.time() - (time.monotonic() - began),
            step=self._before[-1].step if self._before else 0,
        )
        self._run = workdir.absolute().name
        self._gauges = gauges_path(workdir, process)
        self._tokens_per_step = 0
        self._written = self._gauged = -float("inf")
        self._file = RecordFile(path)
        self._write()

    def began(self, step: int, steps: int, tokens_per_step: int) -> None:
        self._record.step, self._record.steps = step, steps
        self._tokens_per_step = tokens_per_step
        self._write()

    def step_done(self, step: int, loss: float, seconds: float) -> None:
        super().step_done(step, loss, seconds)
        record = self._record
        if record.first_step is None:
            record.first_step = step
        else:
            usual = record.usual_step_seconds or seconds
            record.usual_step_seconds = usual + _WEIGHT * (seconds - usual)
        record.step, record.loss, record.step_seconds = step, loss, seconds
        record.tokens += self._tokens_per_step
        self._write()

    def beat(self) -> None:
        if time.monotonic() - self._written > _RECORD_SECONDS:
            self._write()

    @contextlib.contextmanager
    def long(self, name: str) -> Iterator[None]:
        with self.part(name):
            self._write()
            yield

    def save_ended(self) -> None:
        if self._saving is not None:
            self._record.saved_step, self._record.saved_time = self._saving, time.time()
        super().save_ended()

    def ended(self, end: str) -> None:
        self._record.end = end

    def close(self, error: BaseException | None) -> None:
        """The process ends, of that error or by itself."""
        record = self._record
        if isinstance(error, ToldToStop | KeyboardInterrupt):
            record.end = STOPPED
        elif error is not None:
            record.end, record.why = FAILED, " ".join(f"{type(error).__name__}: {error}".split())
        try:
            nothing_done = record.first_step is None and record.steps == 0
            if nothing_done and (error is None or isinstance(error, InputError)):
                # Refused, or complete before: the run stands as it stood.
                self._file.remove()
                return
            self._write(last=True)
        except OSError:
            # Nothing to add where the disk is full, and that is what ends the run.
            if error is None:
                raise
        finally:
            self._file.close()

    def _write(self, last: bool = False) -> None:
        record = self._record
        record.seconds, record.parts = self.account.read()
        record.doing = None if last else self.account.current
        self._file.write(record)
        self._written = self.account.began + record.seconds
        # Before the loop begins the start may still be refused.
        if record.steps and (last or self._written - self._gauged >= _GAUGES_SECONDS):
            self._gauged = self._written
            write_gauges(self._gauges, gauges_text(self._run, [*self._before, record]))


@contextlib.contextmanager
def kept_progress(
    workdir: Path, process: int, processes: int, began: float
) -> Iterator[KeptProgress]:
    """Keeps the account of a start, until the context ends, and how it did."""
    progress = KeptProgress(workdir, process, processes, began)
    error: BaseException | None = None
    try:
        yield progress
    except BaseException as raised:
        error = raised
        raise
    finally:
        progress.close(error)
