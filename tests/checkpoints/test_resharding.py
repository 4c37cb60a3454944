"""A run saved on one mesh goes on on another."""

import dataclasses

import jax
import numpy as np
import pytest

from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import abstract_state, init_state

STEPS = 6


def advance(step, state, make_batch, first: int, last: int):
    """Trains on batches first + 1 .. last; returns the state and the losses."""
    schedule = make_schedule(step.config, STEPS)
    losses = []
    for index in range(first, last):
        state, metrics = step.update(state, make_batch(step, seed=index), schedule)
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def saved(train_step, make_batch, tmp_path_factory):
    """A folder with a checkpoint of step 3 on mesh (8), and the losses of an uninterrupted run."""
    step = train_step((8, 1, 1))
    state = init_state(step.blueprint)
    state, before = advance(step, state, make_batch, 0, 3)
    workdir = tmp_path_factory.mktemp("saved")
    info = CheckpointInfo(3, int(state.updates), 0, {}, "none", {}, step.config)
    with Checkpointer(workdir) as checkpoints:
        checkpoints.save(state, info, None)
        checkpoints.wait()
    _, after = advance(step, state, make_batch, 3, STEPS)
    return workdir, before + after


@pytest.mark.parametrize(
    ("shape", "vocab_axes"),
    [
        pytest.param((2, 4, 1), ("data", "fsdp"), marks=pytest.mark.long),
        ((1, 1, 1), ("data", "fsdp")),
        ((2, 2, 2), ("fsdp",)),
        pytest.param((2, 4, 1), (), marks=pytest.mark.long),
    ],
)
def test_other_meshes_continue_the_run(saved, train_step, make_batch, shape, vocab_axes):
    workdir, losses = saved
    step = train_step(shape, **{"tables.vocab_axes": vocab_axes})
    with Checkpointer(workdir, read_only=True) as checkpoints:
        target = abstract_state(step.blueprint)
        state = checkpoints.restore(3, target)
    assert state.tables["stem"].rows.sharding == target.tables["stem"].rows.sharding
    assert state.params["head.kernel"].sharding == target.params["head.kernel"].sharding
    _, found = advance(step, state, make_batch, 3, STEPS)
    np.testing.assert_allclose(found, losses[3:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("tensors", [(1, 2), (2, 1)])
def test_a_table_is_the_same_over_other_columns(train_step, tmp_path, tensors):
    """Saved from devices, restored to devices, with as many numbers of a row on each or others."""
    first, then = (train_step((2, 4 // tensor, tensor)) for tensor in tensors)
    state = abstract_state(first.blueprint)
    rng = np.random.default_rng(0)
    # Whole numbers, for every field has its own dtype.
    state = jax.tree.map(
        lambda a: jax.device_put(rng.integers(0, 100, a.shape).astype(a.dtype), a.sharding), state
    )
    info = CheckpointInfo(1, 1, 0, {}, "none", {}, first.config)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state, info, None)
        checkpoints.wait()
        target = abstract_state(then.blueprint)
        found = checkpoints.restore(1, target)
    for name, field in vars(found.tables["stem"]).items():
        assert field.sharding == getattr(target.tables["stem"], name).sharding
        np.testing.assert_array_equal(field, getattr(state.tables["stem"], name), err_msg=name)


def test_counters_come_back(saved, train_step):
    step = train_step((1, 1, 1))
    with Checkpointer(saved[0], read_only=True) as checkpoints:
        state = checkpoints.restore(3, abstract_state(step.blueprint))
    counters = dataclasses.astuple(dataclasses.replace(state, params={}, opt_state=(), tables={}))
    assert [int(x) for x in counters[:3]] == [3, 3, 0]
