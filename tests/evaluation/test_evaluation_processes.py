"""Measurements by two processes: the figures of one, written once, refused together.

The file is its own child: `python .../test_evaluation_processes.py CASE...` divides numbers.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from stem_jax import evaluate
from stem_jax.errors import InputError
from stem_jax.evaluation import division, measurement
from stem_jax.evaluation.division import divide
from stem_jax.processes.agreement import unanimous
from stem_jax.processes.cluster import Gang, membership
from tests.children import child, finish, free_port, gang
from tests.saved_models import SIZES, save_run, trained_state

TASKS = Path(__file__).parents[1] / "data" / "lm_eval_tasks"
pytestmark = pytest.mark.little_effort
MODES = {
    "perplexity": ["--perplexity=facts,needles", "--limit=8", "--resident-rows=104"],
    "tasks": [f"--tasks={TASKS}", "--limit=6", "--log-samples"],
}


@pytest.fixture(scope="module")
def run_folder(train_step, make_batch, tmp_path_factory):
    """A model of bytes that knows little; test_needle_model.py has one that finds needles."""
    folder = tmp_path_factory.mktemp("run")
    step = train_step(**{**SIZES, "model.stem_layers": (1,), "model.num_layers": 2})
    save_run(folder, step, trained_state(step, make_batch))
    return folder


@pytest.mark.parametrize(
    ("mode", "count"),
    [
        ("perplexity", 2),
        pytest.param("perplexity", 4, marks=pytest.mark.long),
        pytest.param("tasks", 2, marks=pytest.mark.long),
    ],
)
def test_several_processes_equal_one(run_folder, tmp_path, capsys, mode, count):
    outs = [tmp_path / name / "found.json" for name in ("alone", "both")]
    alone, both = (
        [f"--workdir={run_folder}", *MODES[mode], "--batch-size=4", f"--out={out}"] for out in outs
    )
    evaluate.main(alone)
    table = capsys.readouterr().out.replace(str(outs[0].parent), str(outs[1].parent))
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(p)
            for p in gang("stem_jax.evaluate", both, *[[*both, "--no-progress"]] * (count - 1))
        ]
        said = [finish(process) for process in processes]
    # Bit for bit, every answer included.
    assert outs[1].read_text() == outs[0].read_text()
    assert [path.suffix for path in sorted(outs[1].parent.iterdir())] == [
        path.suffix for path in sorted(outs[0].parent.iterdir())
    ]
    assert table in said[0] and str(outs[1]) not in said[1]


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ("run", "process 1 differs from process 0 in --seed: 1, not 0; start all"),
        pytest.param("none", "--workdir=.*none does not exist", marks=pytest.mark.long),
    ],
)
def test_processes_that_differ_are_refused_together(run_folder, tmp_path, first, message):
    folders = {"run": run_folder, "none": tmp_path / "none"}
    commands = [
        [f"--workdir={folders[first]}", "--niah"],
        [f"--workdir={run_folder}", "--niah", "--seed=1"],
    ]
    with contextlib.ExitStack() as stack:
        for process in [stack.enter_context(p) for p in gang("stem_jax.evaluate", *commands)]:
            assert re.search(f"error: process .*{message}", finish(process, code=1))


def test_every_batch_is_worked_on_by_one_process(monkeypatch):
    batches = [[n] * n for n in range(1, 8)]
    worked, parts = [], []

    def work(own):
        worked.append(list(own))
        yield from map(sum, own)

    def as_process(index, exchange):
        done = []
        monkeypatch.setattr(jax, "process_index", lambda: index)
        monkeypatch.setattr(jax, "process_count", lambda: 3)
        monkeypatch.setattr(division, "exchange", exchange)
        return divide(batches, work, lambda some: done.extend(some)), done

    # The first exchange of a process compares what it was given.
    def compared(own):
        return [own] * 3 if len(own) == hashlib.sha256().digest_size else None

    def give(make, patience):
        own = make()
        if digests := compared(own):
            return digests
        parts.append(own)
        raise InputError("the others are not there yet")

    for index in range(3):
        with pytest.raises(InputError):
            as_process(index, give)
    assert worked == [batches[0::3], batches[1::3], batches[2::3]]

    def take(make, patience):
        return compared(make()) or parts

    for index in range(3):
        results, done = as_process(index, take)
        assert results == [n * n for n in range(1, 8)]
        # Process 0, which draws the bar, comes to the end of it.
        assert done == batches or index > 0


def test_batches_that_differ_are_refused_before_any_is_worked_on(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(division, "exchange", lambda make, patience: [make(), b"others"])

    def work(own):
        raise AssertionError("worked")

    with pytest.raises(InputError, match="process 1 asks the model something else than process 0"):
        divide([1, 2, 3], work)


def test_what_others_print_is_not_in_the_json(monkeypatch, tmp_path, capfd):
    def measure(args):
        os.write(1, b"[Gloo] Rank 0 is connected\n")
        return SimpleNamespace(record={"step": 3})

    monkeypatch.setattr(measurement, "measure", measure)
    evaluate.main([f"--workdir={tmp_path}", "--facts", "--json"])
    output, errors = capfd.readouterr()
    assert json.loads(output) == {"step": 3} and "[Gloo] Rank 0" in errors


CASES = {
    "none": None,
    "inside": "process 1: seven is refused",
    "between": "process 1: that is enough",
    "fewer": "one process has more to do than another; give all of them the same command",
    "others": "process 1 asks the model something else than process 0; give all processes",
}


def test_a_failure_in_one_ends_all_soon():
    """Not after the minutes in which a heartbeat may be late, and not by an abort of JAX's."""
    outs = _divided(["fails"], code=70)
    for out, said in zip(outs, ("process 1 failed: OSError: [Errno 5] disk", "disk")):
        assert said in out and "failed, or lost another one" in out
        assert "stack trace" not in out


def test_a_refusal_in_one_is_one_in_all_wherever_it_comes():
    """And all are ready for the next question: one pair is asked each case."""
    for index, out in enumerate(_divided(CASES, code=1)):
        parts = dict(re.findall(r"^case (\w+)\n(.*?)(?=^case|\Z)", out, re.MULTILINE | re.DOTALL))
        assert list(parts) == list(CASES)
        for case, message in CASES.items():
            if message is None:
                assert parts[case].count(f"found {[n * n for n in range(10)]}") == 3
            else:
                # Who is refused itself says so without a number.
                own = message.removeprefix("process 1: ") if index == 1 else message
                assert f"refused {own}" in parts[case]
        # The last one ended the process.
        assert f"error: process {index}: {own}" in parts[case]


def _divided(cases: Iterable[str], code: int) -> list[str]:
    """What two processes printed."""
    address = f"localhost:{free_port()}"
    environment = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(child(__file__, *cases, JAX_PROCESS_ID=index, **environment))
            for index in "01"
        ]
        return [finish(process, code) for process in processes]


def _divide_numbers(case: str) -> None:
    second = jax.process_index() == 1

    def work(batches):
        for number in batches:
            if case == "inside" and number == 7:
                raise InputError("seven is refused")
            if case == "fails" and number == 7:
                raise OSError(5, "disk")
            yield number * number

    for number in range(3):
        if case == "between" and second and number == 1:
            raise InputError("that is enough")
        if case == "fewer" and second and number == 1:
            return
        numbers = range(11) if case == "others" and second else range(10)
        print("found", divide(numbers, work), flush=True)


def _divide_for(cases: list[str]) -> None:
    with membership(Gang.from_environment()):
        for case in cases:
            print("case", case, flush=True)
            try:
                with unanimous(120, tell_failures=True):
                    _divide_numbers(case)
            except InputError as error:
                print("refused", error, flush=True)
                if case == cases[-1]:
                    raise


if __name__ == "__main__":
    _divide_for(sys.argv[1:])
