"""Ends a process that makes no progress, and says where each of its threads was."""

import contextlib
import faulthandler
import os
import sys
import threading
from pathlib import Path
from typing import TextIO

# "Try again" of sysexits.h: a launcher may start the same command once more.
EXIT_STUCK = 75
_WRITE_SECONDS = 5


class Watchdog:
    """Aborts the process when `beat` was not called for so many seconds. Use it as a context.

    A peer that hangs, or that was stopped, leaves this process waiting in a collective for ever:
    missing heartbeats tell of dead processes alone.
    """

    def __init__(self, timeout: float | None, log: Path):
        """timeout: seconds; None never aborts. log: file that gets the stacks, beside stderr."""
        self._timeout = timeout
        self._log = log
        self._progress = ["start"]
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._watch, args=(timeout,), name="watchdog", daemon=True
        )

    def __enter__(self) -> "Watchdog":
        self.beat("start")
        if self._timeout is not None:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()

    def beat(self, place: str) -> None:
        """Tells that work got to `place`."""
        self._progress = [place]

    def _watch(self, timeout: float) -> None:
        pause = min(timeout / 4, 5.0)
        seen, idle = self._progress, 0.0
        while not self._ended.wait(pause):
            # Pauses are counted, not the clock: a process that was suspended is not stuck.
            seen, idle = self._progress, idle + pause if self._progress is seen else 0.0
            if idle >= timeout:
                self._abort(seen[0])

    def _abort(self, place: str) -> None:
        text = (
            f"error: no progress for {self._timeout:g} s (train.step_timeout) after {place}: this "
            "process or one it waits for is stuck. Stacks of all threads follow; the last "
            "checkpoint stands, and the same command continues\n"
        )
        # Whatever is stuck may be the folder of the log, or a full disk: each file gets its time.
        for write in (self._write_stderr, self._write_log):
            writer = threading.Thread(target=write, args=(text,), daemon=True)
            writer.start()
            writer.join(_WRITE_SECONDS)
        os._exit(EXIT_STUCK)

    def _write_stderr(self, text: str) -> None:
        with contextlib.suppress(OSError):
            _write_stacks(sys.stderr, text)

    def _write_log(self, text: str) -> None:
        with contextlib.suppress(OSError), self._log.open("a") as log:
            _write_stacks(log, text)


def _write_stacks(file: TextIO, text: str) -> None:
    file.write(text)
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)
