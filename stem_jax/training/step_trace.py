"""A trace of some steps of a run, as TensorBoard's profile page, xprof and Perfetto read it."""

import re
from pathlib import Path

import jax

from stem_jax.errors import InputError
from stem_jax.processes.process_log import log

# Of a run's folder; beneath it JAX names a folder by the time and a file by the host.
FOLDER = "profile"


def traced_steps(text: str) -> range:
    """The steps of `train.profile_steps`: "20-22", "20" or "none".

    Raises:
        InputError: anything else, and a range that ends before it begins.
    """
    if text == "none":
        return range(0)
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise InputError(
            f"train.profile_steps={text!r} names no steps; write the first and the last one to "
            'trace, such as 20-22, or "none"'
        )
    return range(first, last + 1)


def check_traced_steps(text: str, last_step: int) -> None:
    """Raises InputError for steps to trace that are none, or that a run never comes to."""
    steps = traced_steps(text)
    if steps and steps[0] > last_step:
        raise InputError(
            f"train.profile_steps={text} lies behind the run's last step, train.steps={last_step}; "
            "lower it, or set it to none"
        )


class StepTrace:
    """Traces steps in every process. Those before the run's first one are left out, and those
    behind its last.
    """

    def __init__(self, steps: range, workdir: Path):
        self._steps = steps
        self._folder = workdir / FOLDER
        self._running = False
        self._first = self._last = 0

    def before(self, step: int, state) -> None:
        """Begins with the first step that there is, when those before it are done."""
        if step in self._steps and not self._running:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            # Of every Python call of every thread: in the way of the steps, and of no use for them.
            options.python_tracer_level = 0
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._running, self._first = True, step

    def after(self, step: int, results) -> None:
        """Ends with the last one, when its results are there."""
        self._last = step
        if self._running and step == self._steps[-1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends the trace, also one that the run's end, a stop or an error came into."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            if self._last >= self._first:
                log.info(f"trace of steps {self._first} to {self._last}: {self._folder}")
