"""Which checkpoints stay, and what half a checkpoint is worth."""

import numpy as np
import pytest

from stem_jax.checkpoint import Checkpointer, CheckpointInfo
from stem_jax.errors import InputError
from stem_jax.training.state import abstract_state, init_state


@pytest.fixture(scope="module")
def fresh(train_step):
    """A train step and a fresh state of it."""
    step = train_step((1, 1, 1))
    return step, init_state(step.config, step.model, step.mesh)


def save_all(folder, fresh, losses: dict[int, float | None]):
    step, state = fresh
    with Checkpointer(folder, keep=2) as checkpoints:
        for number, loss in losses.items():
            info = CheckpointInfo(number, number, 0, "none", {}, step.config)
            checkpoints.save(state, info, loss)
            checkpoints.wait()
        return checkpoints.steps()


def test_the_newest_and_the_best_stay(fresh, tmp_path):
    assert save_all(tmp_path, fresh, {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 4.0}) == [2, 4, 5]


def test_without_validation_the_newest_stay(fresh, tmp_path):
    assert save_all(tmp_path, fresh, {1: None, 2: None, 3: None}) == [2, 3]


def test_everything_comes_back_bit_for_bit(fresh, tmp_path):
    step, state = fresh
    save_all(tmp_path, fresh, {7: None})
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        target = abstract_state(step.config, step.model, step.mesh)
        found = checkpoints.restore(7, target)
        params, table = checkpoints.restore_model(7, target)
    for name, array in state.params.items():
        np.testing.assert_array_equal(found.params[name], array)
        np.testing.assert_array_equal(params[name], array)
    np.testing.assert_array_equal(found.table.rows, state.table.rows)
    np.testing.assert_array_equal(table.last_step, state.table.last_step)
    assert int(found.step) == 7


def test_a_half_written_checkpoint_is_not_picked_up(fresh, tmp_path):
    save_all(tmp_path, fresh, {1: None, 2: None})
    newest = tmp_path / "checkpoints" / "2"
    # What a process killed while saving leaves: a folder under another name.
    newest.rename(newest.with_name("2.orbax-checkpoint-tmp"))
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1


def test_a_truncated_file_is_refused_by_name(fresh, tmp_path):
    step, _ = fresh
    save_all(tmp_path, fresh, {3: None})
    files = [p for p in (tmp_path / "checkpoints" / "3" / "params").rglob("*") if p.is_file()]
    for path in files:
        if path.stat().st_size > 4096:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with (
        Checkpointer(tmp_path, read_only=True) as checkpoints,
        pytest.raises(InputError, match=r"3 is incomplete or damaged"),
    ):
        checkpoints.restore(3, abstract_state(step.config, step.model, step.mesh))
