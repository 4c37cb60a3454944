"""Processes that train runs side by side, each on cores of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stem_jax.errors import InputError, TrainingError
from stem_jax.kept_memory import LARGE_PAGES
from stem_jax.study.job import STOPPED

_POLL_SECONDS = 0.2


class Stopped(Exception):
    """A signal ended the work; what was under way was saved."""


class Workers:
    """Runs jobs, at most so many at a time; SIGTERM and Ctrl-C reach them, and they save."""

    def __init__(self, number: int, threads: int, folder: Path):
        """Args:
        number: of processes. threads: cores of each; 0: they are not bound to cores.
        folder: for their logs.

        Raises:
            InputError: the machine has not so many cores.
        """
        cores = sorted(os.sched_getaffinity(0)) if threads else []
        if number * threads > len(cores):
            raise InputError(
                f"--workers={number} of --threads={threads} need {number * threads} cores, and "
                f"this process may use {len(cores)}; lower one of them"
            )
        self._cores = [cores[n * threads : (n + 1) * threads] for n in range(number)]
        self._folder = folder
        self._running: dict[int, tuple[subprocess.Popen, dict[str, Any], float]] = {}
        self._signal: int | None = None

    def run(
        self,
        jobs: Sequence[dict[str, Any]],
        code: Path,
        done: Callable[[dict[str, Any], float], None],
        deadline: float | None = None,
    ) -> None:
        """Does all jobs in their order; returns when the last one is done.

        Args:
            jobs: see `job`; each gets its cores here.
            code: folder that holds the package that trains.
            done: is told of each that ended well, and its seconds.
            deadline: by `time.monotonic()`; then none is begun, and those under way save and end.

        Raises:
            Stopped: a signal came, or the deadline.
            TrainingError: a job failed; the others that ran have saved.
        """
        waiting = list(jobs)
        before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            while waiting or self._running:
                free = [n for n in range(len(self._cores)) if n not in self._running]
                for worker in free:
                    if waiting and self._signal is None:
                        self._begin(worker, waiting.pop(0), code)
                if not self._running:
                    break
                time.sleep(_POLL_SECONDS)
                self._collect(done)
                if deadline is not None and time.monotonic() > deadline and self._signal is None:
                    self._note(signal.SIGTERM, None)
            if self._signal is not None:
                raise Stopped
        except BaseException:
            self._end()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _begin(self, worker: int, job: dict[str, Any], code: Path) -> None:
        job = {**job, "cores": self._cores[worker], "parent": os.getpid()}
        log = self._folder / f"{job['name']}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "stem_jax.study.job"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=code,
                # Small steps on CPUs spend more time on pages than on numbers without them.
                env={**os.environ, **LARGE_PAGES, "PYTHONPATH": str(code)},
                # Ctrl-C goes to the parent, which asks each once.
                start_new_session=True,
            )
        assert process.stdin is not None
        process.stdin.write(json.dumps(job).encode())
        process.stdin.close()
        self._running[worker] = (process, job, time.monotonic())
        if self._signal is not None:
            # It came before this one was known to run.
            process.send_signal(signal.SIGTERM)

    def _collect(self, done: Callable[[dict[str, Any], float], None]) -> None:
        for worker, (process, job, start) in list(self._running.items()):
            status = process.poll()
            if status is None:
                continue
            del self._running[worker]
            if status == 0:
                done(job, time.monotonic() - start)
            # It may not have come to where it saves.
            elif self._signal is None or status not in (STOPPED, -signal.SIGTERM):
                log = self._folder / f"{job['name']}.log"
                said = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
                raise TrainingError(
                    f"run {job['name']} ended with status {status}: {said[-1][:300]}; see {log}"
                )

    def _note(self, number: int, frame: object) -> None:
        self._signal = number
        for process, _, _ in self._running.values():
            process.send_signal(signal.SIGTERM)

    def _end(self) -> None:
        """Leaves nobody behind."""
        for process, _, _ in self._running.values():
            process.terminate()
        for process, _, _ in self._running.values():
            process.wait()
        self._running.clear()
