"""Told to stop, a run saves at once; what the stop skipped is made up, as if nothing had been."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from stem_jax import run
from stem_jax.checkpoints.loading import load_run
from stem_jax.config_file import load_config
from stem_jax.run import Ending, train
from stem_jax.run_saves import owes_validation
from stem_jax.training.loop import Loop
from tests import launching

pytestmark = pytest.mark.little_effort

# A validation of three batches is due at steps 3 and 6, as a checkpoint is.
VALUES = launching.SMALL | {
    "train.steps": 6,
    "eval.every": 3,
    "eval.max_batches": 3,
    "checkpoint.every": 3,
    "train.log_every": 1,
}


class Scripted:
    """Wishes to stop when it is asked for the nth time; 0 never."""

    asked = 0
    stop_at = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __call__(self) -> bool:
        Scripted.asked += 1
        return 0 < Scripted.stop_at <= Scripted.asked


@pytest.fixture
def trained(monkeypatch):
    """Trains until the nth question, and says how it ended and how many questions there were."""
    monkeypatch.setattr(run, "StopSignal", Scripted)

    def until(question: int, workdir: Path, **overrides) -> tuple[Ending, int]:
        Scripted.asked, Scripted.stop_at = 0, question
        overrides = VALUES | {key.replace("__", "."): value for key, value in overrides.items()}
        config = load_config("configs/tiny.py", {k: str(v) for k, v in overrides.items()})
        return train(config, workdir), Scripted.asked

    return until


def records(workdir: Path) -> list[dict]:
    """What was logged, without times."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    wanted = ("step", "train/loss", "eval/loss", "eval/bits_per_byte", "eval/tokens")
    return [{k: v for k, v in json.loads(line).items() if k in wanted} for line in lines]


def losses_of_checkpoints(workdir: Path) -> dict[str, dict]:
    """By which the best one is chosen."""
    files = sorted((workdir / "checkpoints").glob("*/metrics/metrics"))
    return {path.parts[-3]: json.loads(path.read_text()) for path in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scripted, "stop_at", 0)
        config = load_config("configs/tiny.py", {k: str(v) for k, v in VALUES.items()})
        assert train(config, workdir) is Ending.COMPLETED
    assert [r["step"] for r in records(workdir)] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert losses_of_checkpoints(workdir).keys() == {"3", "6"}
    return workdir


def assert_nothing_happened(workdir: Path, undisturbed: Path) -> None:
    assert records(workdir) == records(undisturbed)
    assert losses_of_checkpoints(workdir) == losses_of_checkpoints(undisturbed)
    found, expected = load_run(workdir), load_run(undisturbed)
    for name, array in expected.params.items():
        np.testing.assert_array_equal(found.params[name], array, err_msg=name)


def last_record(workdir: Path) -> dict:
    return records(workdir)[-1]


@pytest.mark.long
def test_a_stop_saves_before_a_validation_that_is_made_up(trained, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    # A question before the first step and after each, and then at three batches of the validation.
    assert trained(4, workdir) == (Ending.STOPPED, 4)
    assert last_record(workdir).keys() == {"step", "train/loss"}
    assert losses_of_checkpoints(workdir) == {}
    # Making up is stopped in its turn, and again.
    assert trained(3, workdir) == (Ending.STOPPED, 3)
    assert "eval/loss" not in last_record(workdir)
    assert trained(1 + 3 + 3 + 2, workdir) == (Ending.STOPPED, 9)
    assert last_record(workdir).keys() == {"step", "train/loss"}
    assert losses_of_checkpoints(workdir).keys() == {"3"}
    # Of the last step, too; nothing else is left to do.
    assert trained(0, workdir) == (Ending.COMPLETED, 4)
    assert_nothing_happened(workdir, undisturbed)
    assert trained(0, workdir) == (Ending.WAS_COMPLETE, 0)


@pytest.mark.long
def test_a_stop_inside_a_validation_with_rows_on_their_way(trained, undisturbed, tmp_path):
    workdir, offloaded = tmp_path / "run", {"tables__resident_rows": 256}
    assert trained(1 + 3 + 1, workdir, **offloaded) == (Ending.STOPPED, 5)
    assert last_record(workdir)["step"] == 3
    assert trained(0, workdir, **offloaded)[0] is Ending.COMPLETED
    assert_nothing_happened(workdir, undisturbed)


def test_a_wish_is_heard_while_batches_are_in_flight(monkeypatch):
    """Not when all of them were dispatched: then the wait for the results has begun."""
    dispatched, fetched = [], []

    def evaluate(*_):
        dispatched.append(len(dispatched))
        return np.float32(dispatched[-1]), np.int32(1)

    def device_get(sums):
        fetched.extend(int(nats) for nats, _ in sums)
        return sums

    monkeypatch.setattr(jax, "device_get", device_get)
    programs = SimpleNamespace(
        place=lambda batch: batch,
        evaluate=evaluate,
        reads=SimpleNamespace(
            memories={}, sizes_for=lambda batch, demand: None, tables=lambda batch, sizes: {}
        ),
        config=SimpleNamespace(tables=SimpleNamespace(prefetch=2)),
    )
    data = SimpleNamespace(held_out=[{}] * 10)
    loop = Loop(None, programs, data, None, {}, None, None, lambda: len(dispatched) == 4)
    assert loop._validate("state", None, 3, None) == ("state", None)
    assert dispatched == [0, 1, 2, 3] and fetched == [0, 1, 2]


def test_a_validation_that_stands_in_the_log_is_not_owed(tmp_path):
    class Info:
        step, owes_validation = 3, True

    log = tmp_path / "metrics.jsonl"
    assert owes_validation(tmp_path, Info)
    log.write_text('{"step": 2, "eval/loss": 1.0}\n{"step": 3, "train/loss": 1.0}\n')
    assert owes_validation(tmp_path, Info)
    log.write_text(log.read_text() + '{"step": 3, "eval/loss": 1.0}\n')
    assert not owes_validation(tmp_path, Info)
    assert not owes_validation(tmp_path, None)


def test_processes_are_asked_the_same_questions(monkeypatch):
    """The service picks one that none of them has passed; what it told once stays told."""
    from stem_jax.processes.stop_signal import StopSignal

    asked = []
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr(
        "jax.experimental.multihost_utils.reached_preemption_sync_point",
        lambda number: asked.append(number) or number == 3,
    )
    stop = StopSignal()
    assert [stop() for _ in range(5)] == [False, False, True, True, True]
    assert asked == [1, 2, 3]


def test_a_save_asks_no_question(trained, tmp_path, monkeypatch):
    """Orbax's own, by the number of the step, would move the one that processes agree on."""
    asked = []
    monkeypatch.setattr(
        "jax.experimental.multihost_utils.reached_preemption_sync_point", asked.append
    )
    assert trained(3, tmp_path / "run") == (Ending.STOPPED, 3)
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir() and asked == []
