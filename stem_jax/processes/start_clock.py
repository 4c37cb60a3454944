"""How long a run takes from the start of its process to its first step, and where it goes."""

import os
import time
from pathlib import Path

from stem_jax.processes.process_log import log


class StartClock:
    """Counts from the start of the process; `mark` ends a phase, `stop` the whole.

    began: when the process was started, by the monotonic clock, in seconds.
    """

    def __init__(self):
        self.began = time.monotonic() - _process_age()
        self._marks: list[tuple[str, float]] = []
        self.running = True

    def mark(self, phase: str) -> None:
        """Ends a phase and names it."""
        self._marks.append((phase, time.monotonic()))

    def stop(self, step: int) -> float:
        """The first step is done: says so and returns the seconds since the process began."""
        self.mark("compiling and the step")
        self.running = False
        last, parts = self.began, []
        for phase, moment in self._marks:
            parts.append(f"{phase} {moment - last:.1f}")
            last = moment
        log.info(
            f"first step ({step}) {last - self.began:.1f} s after the start: {', '.join(parts)}"
        )
        return last - self.began


def _process_age() -> float:
    """Seconds since this process was started; 0 where the system does not tell."""
    try:
        # proc(5): field 22 is the start in clock ticks after boot; field 2 may hold spaces.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return age
    except (OSError, AttributeError):
        return 0.0
