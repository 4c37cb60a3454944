"""Tells a tracker of a run, on a thread, whatever becomes of the tracker."""

import concurrent.futures
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stem_jax import background
from stem_jax.processes.process_log import log
from stem_jax.training.trackers.tracker import Course, Ending, Row, Tracker

# Between two looks for new records: a server is asked once for all that came meanwhile.
_PAUSE_SECONDS = 1.0
# After an error, and at most after more of them.
_FIRST_WAIT, _LONGEST_WAIT = 5.0, 60.0
_MOST_ROWS = 50
# Losses made again are the same but for their last bits, unless something else is computed.
_SAME = 1e-3


class Reporter:
    """One tracker, and how far it is.

    Nothing is queued: the run's records are there anyway, and the thread remembers its place in
    them. A tracker that is slow gets many at a time; one that fails is asked again later.
    """

    def __init__(self, name: str, tracker: Tracker):
        self._name, self._tracker = name, tracker
        self._course = Course()
        self._place, self._last = 0, 0
        self._extras: list[Callable[[Tracker], None]] = []
        self._wake, self._ended = threading.Event(), threading.Event()
        self._ending: Ending | None = None
        self._given_up = False
        self._work = background.begin(self._serve, f"tracker {name}")

    def follow(self, course: Course) -> None:
        """Says what there is to report."""
        self._course = course
        self.wake()

    def wake(self) -> None:
        """There are more records."""
        self._wake.set()

    def add(self, extra: Callable[[Tracker], None]) -> None:
        """Has something else written, behind the records."""
        self._extras.append(extra)
        self.wake()

    def end(self, ending: Ending) -> None:
        """There is nothing more to come."""
        self._ending = ending
        self._ended.set()
        self.wake()

    def wait(self, seconds: float) -> bool:
        """Waits for the tracker, once `end` was called, and no longer than that.

        Returns whether it has all.
        """
        done, _ = concurrent.futures.wait([self._work], seconds)
        if not done:
            self._given_up = True
            missing = len({record["step"] for record in self._course.records[self._place :]})
            log.warning(
                f"{self._name} did not end within {seconds:.0f} s (tracking.timeout), with "
                f"{missing} steps to report; they are in metrics.jsonl, and a next start reports "
                "them"
            )
        return bool(done)

    def _serve(self) -> None:
        opened, wait = False, 0.0
        while not self._given_up:
            # In this order: no call to wake up is lost, and what is told before the end is there.
            self._wake.clear()
            ending = self._ending
            try:
                if not opened:
                    self._place, self._last = 0, self._tracker.begin()
                    opened = True
                self._report()
                if wait:
                    log.info(f"{self._name} answers again, and has all steps")
                    wait = 0.0
                if ending is not None:
                    self._tracker.close(ending)
                    return
            except (Exception, SystemExit) as error:
                opened = False
                if not wait:
                    log.warning(
                        f"{self._name} fails ({_in_a_line(error)}); the run goes on, and it is "
                        "tried again until it has all steps"
                    )
                wait = min(2 * wait, _LONGEST_WAIT) or _FIRST_WAIT
                if self._ended.wait(wait):
                    time.sleep(_PAUSE_SECONDS)
                continue
            self._ended.wait(_PAUSE_SECONDS)
            self._wake.wait()

    def _report(self) -> None:
        while rows := self._next_rows():
            self._tracker.write(rows)
            self._last = rows[-1].step
        while self._extras and not self._given_up:
            self._extras[0](self._tracker)
            del self._extras[0]

    def _next_rows(self) -> list[Row]:
        """The next steps that the tracker lacks, of which all is known."""
        rows: list[Row] = []
        records = self._course.records
        while len(rows) < _MOST_ROWS and self._place < len(records) and not self._given_up:
            step, end = records[self._place]["step"], self._place
            values: dict[str, Any] = {}
            while end < len(records) and records[end]["step"] == step:
                values |= records[end]
                end += 1
            if end == len(records) and "eval/loss" not in values and self._course.awaits(step):
                break
            self._place = end
            if step > self._last:
                rows.append(Row(step, time.time(), _numbers(values)))
            elif self._is_another(step, values):
                self._start_anew(step)
        return rows

    def _is_another(self, step: int, values: Mapping[str, Any]) -> bool:
        """Whether a step that the tracker has came out otherwise, made again."""
        if step not in self._course.taken_back or "train/loss" not in values:
            return False
        before, now = self._course.taken_back[step], values["train/loss"]
        if before is None or now is None:
            return before is not now
        return abs(now - before) > _SAME * abs(before)

    def _start_anew(self, step: int) -> None:
        log.info(
            f"{self._name}: step {step} is another than the one that was reported before the run "
            "went on from its checkpoint; a new page shows all steps"
        )
        self._tracker.renew()
        self._course = dataclasses.replace(self._course, taken_back={})
        self._place, self._last = 0, self._tracker.begin()


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Those that are finite."""
    return {
        key: value
        for key, value in record.items()
        if key != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def picture(path: Path) -> Callable[[Tracker], None]:
    """What `add` takes for a PNG file."""
    return lambda tracker: tracker.write_picture(path)


def text(name: str, content: str) -> Callable[[Tracker], None]:
    """What `add` takes for a text."""
    return lambda tracker: tracker.write_text(name, content)


def _in_a_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
