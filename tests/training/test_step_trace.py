"""Which steps a run traces, and that it says so. What is in a trace: `test_run`."""

import jax
import pytest

from stem_jax.errors import InputError
from stem_jax.training import step_trace
from stem_jax.training.step_trace import StepTrace, check_traced_steps, traced_steps


@pytest.mark.parametrize("steps", ["0-3", "5-4", "all", "3-", "2.5"])
def test_steps_to_trace_that_are_none_are_refused(steps):
    with pytest.raises(InputError, match=r"train\.profile_steps=.* names no steps; write"):
        traced_steps(steps)


def test_steps_to_trace():
    assert list(traced_steps("20-22")) == [20, 21, 22]
    assert list(traced_steps("7")) == [7] and not traced_steps("none")


def test_steps_that_no_run_comes_to_are_refused():
    with pytest.raises(
        InputError, match=r"profile_steps=20-22 lies behind .* train\.steps=19; low"
    ):
        check_traced_steps("20-22", 19)
    for steps in ("20-22", "20", "3", "none"):
        check_traced_steps(steps, 20)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (range(1, 8), ["steps 4 to 6"]),
        # A run that ends, or is stopped, in between; one that begins in between; before; behind.
        (range(1, 6), ["steps 4 to 5"]),
        (range(5, 8), ["steps 5 to 6"]),
        (range(1, 4), []),
        (range(7, 9), []),
    ],
)
def test_a_trace_is_told_with_the_steps_that_it_has(made, said, monkeypatch, tmp_path):
    found, running = [], []
    monkeypatch.setattr(step_trace.log, "info", found.append)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *a, **k: running.append(1))
    monkeypatch.setattr(jax.profiler, "stop_trace", running.pop)
    trace = StepTrace(traced_steps("4-6"), tmp_path)
    for step in made:
        trace.before(step, None)
        trace.after(step, None)
    trace.close()
    assert found == [f"trace of {steps}: {tmp_path / 'profile'}" for steps in said] and not running
