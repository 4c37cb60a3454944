"""Training in bfloat16: what is kept in float32, what a step reads, and that a run goes on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.loading import checkpoint_fingerprints, load_run
from stem_jax.checkpoints.saved_model import open_saved_model
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import abstract_state, init_state
from tests.saved_models import BYTES, save_run

pytestmark = pytest.mark.little_effort
STEPS = 6
BFLOAT16 = {
    "model.param_dtype": "bfloat16",
    "model.compute_dtype": "bfloat16",
    "train.micro_batches": 2,
    "model.vocab_size": 258,
    "model.stem_layers": (1,),
}


def advance(step, state, make_batch, first: int, last: int, rate: float = 3e-3):
    """Trains on batches first .. last - 1; returns the state and the losses."""
    schedule = make_schedule(step.config, STEPS, np.full(STEPS, rate))
    losses = []
    for index in range(first, last):
        state, metrics = step.update(state, make_batch(step, seed=index), schedule)
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def run(train_step, make_batch):
    """A train step in bfloat16, copies on the host of its state after 3 updates and after 6, and
    the losses between them.
    """
    step = train_step(**BFLOAT16)
    state, _ = advance(step, init_state(step.blueprint), make_batch, 0, 3)
    middle = jax.device_get(state)
    state, losses = advance(step, state, make_batch, 3, STEPS)
    return step, middle, jax.device_get(state), losses


def saved(folder, step, state) -> Checkpointer:
    touched = {name: int(n) for name, n in state.touched_rows.items()}
    info = CheckpointInfo(3, int(state.updates), 0, touched, BYTES.fingerprint, {}, step.config)
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(jax.device_put(state, step.shardings), info, None)
    return Checkpointer(folder, read_only=True)


def dtypes(tree) -> set[str]:
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


def test_parameters_and_moments_are_float32_and_one_program_updates_them(run):
    """Moments that became float32 in the first update would ask for a second program."""
    step, middle, last, _ = run
    for state in (abstract_state(step.blueprint), middle, last):
        assert dtypes(state.params) == {"float32"}
        assert dtypes(state.opt_state[0].mu) == dtypes(state.opt_state[0].nu) == {"float32"}
    assert step.update._cache_size() == 1
    placed = {array.name: array.itemsize for array in step.model.placed()}
    assert set(placed.values()) == {4}


def test_a_resumed_run_is_bit_equal(run, make_batch, tmp_path):
    step, middle, last, losses = run
    with saved(tmp_path, step, middle) as checkpoints:
        state = checkpoints.restore(3, abstract_state(step.blueprint))
    state, found = advance(step, state, make_batch, 3, STEPS)
    assert found == losses
    for one, other in zip(jax.tree.leaves(last), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)
    assert step.update._cache_size() == 1


def test_steps_below_the_rounding_of_bfloat16_add_up(run, make_batch):
    """A weight near 0.1 has neighbours 5e-4 apart in bfloat16; each step moves it by 1e-5."""
    step, middle, _, _ = run
    name = "blocks.0.ffn.gate_proj.kernel"
    start = jax.device_put(middle, step.shardings)
    state, _ = advance(step, start, make_batch, 3, STEPS, rate=1e-5)
    moved = np.abs(np.asarray(state.params[name]) - middle.params[name])
    assert np.median(moved) > 1e-6


def test_a_step_reads_rounded_copies(run, train_step, make_batch):
    """Parameters that were rounded before give the same loss, and others do not."""
    step, middle, _, _ = run
    schedule = make_schedule(step.config, STEPS)
    batch = make_batch(step, seed=9)

    def loss(params):
        state = dataclasses.replace(middle, params=params)
        return float(step.evaluate(jax.device_put(state, step.shardings), batch, schedule)[0])

    rounded = jax.tree.map(
        lambda p: np.asarray(p.astype(jnp.bfloat16).astype(np.float32)), middle.params
    )
    assert not np.array_equal(rounded["head.kernel"], middle.params["head.kernel"])
    assert loss(middle.params) == loss(rounded)
    assert loss({**rounded, "norm.scale": rounded["norm.scale"] * 1.5}) != loss(rounded)


@pytest.mark.parametrize("moments", ["bfloat16", "float32"])
def test_a_checkpoint_with_bfloat16_parameters_goes_on(run, make_batch, tmp_path, moments):
    """As earlier versions wrote them; with micro-batches their moments were float32."""
    step, middle, _, _ = run
    old = dataclasses.replace(
        middle,
        params=jax.tree.map(lambda p: p.astype(jnp.bfloat16), middle.params),
        opt_state=jax.tree.map(lambda x: x.astype(moments) if x.ndim else x, middle.opt_state),
    )
    with saved(tmp_path, step, old) as checkpoints:
        state = checkpoints.restore(3, abstract_state(step.blueprint))
    for found, kept in ((state.params, old.params), (state.opt_state, old.opt_state)):
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(kept), strict=True):
            np.testing.assert_array_equal(one, np.asarray(other, one.dtype))
    assert dtypes(state.params) == {"float32"}
    state, losses = advance(step, state, make_batch, 3, STEPS)
    assert np.all(np.isfinite(losses)) and step.update._cache_size() == 1


def test_readers_of_a_run_have_what_training_reads(run, tmp_path):
    """Generation and exports agree on the parameters, and a patch fits both."""
    step, _, last, _ = run
    save_run(tmp_path, step, jax.device_put(last, step.shardings))
    loaded, stored = load_run(tmp_path), open_saved_model(tmp_path)
    assert dtypes(loaded.params) == {"bfloat16"}
    for name, value in loaded.params.items():
        copy = np.asarray(last.params[name].astype(jnp.bfloat16))
        np.testing.assert_array_equal(np.asarray(value), copy)
        np.testing.assert_array_equal(stored.param(name), copy)
    norm = stored.param("norm.scale")
    fingerprint = checkpoint_fingerprints(stored.config, loaded.step, stored.tokenizer, norm)
    assert fingerprint == loaded.fingerprints


@pytest.mark.long
@pytest.mark.parametrize(
    ("shape", "dtypes_of"), [((1, 1, 1), ["compute"]), ((2, 2, 2), ["param", "compute"])]
)
def test_losses_are_close_to_those_of_float32(shape, dtypes_of, train_step, make_batch):
    found = []
    for changes in ({}, {f"model.{name}_dtype": "bfloat16" for name in dtypes_of}):
        step = train_step(shape, **changes)
        state = init_state(step.blueprint)
        found.append(advance(step, state, make_batch, 0, STEPS)[1])
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=0.02)
