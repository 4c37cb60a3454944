"""Positions of a sequence over several devices: the same losses, gradients, rows and drops."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.inference_mesh import inference_mesh
from stem_jax.context_order import in_sequence_order, slots
from stem_jax.errors import InputError
from stem_jax.mesh import axis_size, make_mesh
from stem_jax.model.attention import attend
from stem_jax.planning.compiled import compile_program
from stem_jax.planning.program import train_step_program
from stem_jax.planning.topology import Topology
from stem_jax.run_checks import check_mesh
from stem_jax.tables.spec import logical
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import abstract_state, init_state
from tests.offloading import SIZES, run

# Data, fsdp, context, tensor. Chunks of 6 and of 3 positions; every sequence is two documents.
ALONE, TWO, FOUR, ROWS_TOO = (1, 1, 1, 1), (2, 2, 2, 1), (1, 2, 4, 1), (1, 1, 4, 2)
LENGTH = {"train.seq_len": 24}
KEYS = {
    TWO: {"train.micro_batches": 2},
    FOUR: {},
    # Its rows lie over context as well; else devices along it have copies.
    ROWS_TOO: {"tables.vocab_axes": ("fsdp", "context")},
}


@pytest.mark.parametrize(("length", "devices"), [(8, 1), (8, 2), (24, 3), (64, 4)])
def test_each_device_has_an_early_chunk_and_a_late_one(length, devices):
    found = slots(length, devices)
    assert sorted(found) == list(range(length))
    # Pairs of a query and a key before it.
    work = (found + 1).reshape(devices, -1).sum(axis=1)
    assert set(work) == {length * (length + 1) // 2 // devices}
    np.testing.assert_array_equal(in_sequence_order(jnp.asarray(found), 0, devices), range(length))
    if (length, devices) == (8, 2):
        assert found.tolist() == [0, 1, 6, 7, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def updates(train_step, make_batch):
    """updates(mesh shape): the state after one update, and the losses of three."""
    first = jax.device_get(_fresh(train_step(ALONE, **LENGTH)))
    found = {}

    def make(shape):
        if shape not in found:
            step = train_step(shape, **LENGTH, **KEYS.get(shape, {}))
            state, kept, losses = jax.device_put(first, step.shardings), None, []
            for seed in range(3):
                batch = make_batch(step, seed=seed, ragged=True)
                state, metrics = step.update(state, batch, make_schedule(step.config, 8))
                losses.append(float(metrics["loss"]))
                kept = kept or (step, jax.device_get(state), _copies(state))
            found[shape] = (*kept, losses)
        return found[shape]

    return make


def _fresh(step):
    return init_state(step.blueprint)


def _copies(state) -> dict[str, list[np.ndarray]]:
    """Of each shard of the rows, what the devices that have it hold."""
    found = {}
    for shard in state.tables["stem"].rows.addressable_shards:
        found.setdefault(str(shard.index), []).append(np.asarray(shard.data))
    return found


# The first of these compiles the step of one device too.
@pytest.mark.little_effort
@pytest.mark.parametrize("shape", [TWO, FOUR, pytest.param(ROWS_TOO, marks=pytest.mark.long)])
def test_losses_and_gradients_do_not_depend_on_context(shape, updates):
    _, alone, _, losses = updates(ALONE)
    _, found, copies, found_losses = updates(shape)
    np.testing.assert_allclose(found_losses, losses, rtol=0, atol=1e-5)
    # After the first update a moment is its gradient, but for one factor of all.
    expected = alone.opt_state[0].mu | {"rows": logical(alone.tables["stem"].mu)}
    gradients = found.opt_state[0].mu | {"rows": logical(found.tables["stem"].mu)}
    total = np.linalg.norm([np.linalg.norm(x) for x in alone.opt_state[0].mu.values()])
    for name, gradient in expected.items():
        size, error = np.linalg.norm(gradient), np.linalg.norm(gradients[name] - gradient)
        # Of the whole gradient; some arrays have a hundredth of it, and roundings of all.
        assert error < 1e-6 * (size if name == "rows" else total), name
        assert 1e-3 * total < size and error < 3e-6 * size, name
    for name, same in copies.items():
        for other in same[1:]:
            np.testing.assert_array_equal(other, same[0], err_msg=name)


@pytest.mark.long
@pytest.mark.little_effort
def test_rows_lie_in_copies_unless_context_is_asked_to_share_them(updates):
    for shape, shards, copies in ((FOUR, 2, 4), (ROWS_TOO, 8, 1)):
        step, _, found, _ = updates(shape)
        assert axis_size(step.mesh, step.reads.specs["stem"].vocab_axes) == shards // shape[3]
        assert (len(found), {len(same) for same in found.values()}) == (shards, {copies})


def test_the_same_embeddings_are_dropped(train_step, make_batch):
    dropped = []
    for shape in (ALONE, FOUR):
        step = train_step(shape, **LENGTH, **{"model.token_embedding_dropout": 0.4})
        tokens = make_batch(step).tokens
        drop = jax.jit(lambda number, tokens, step=step: step._dropped(number, tokens))
        dropped.append(np.asarray(in_sequence_order(drop(3, tokens), 2, shape[2])))
    assert 0.3 < dropped[0].mean() < 0.5
    np.testing.assert_array_equal(*dropped)


def _inputs(L: int, Dh: int):
    """Heads of two sequences: five documents of 1 to L tokens, and one with padding behind it."""
    keys = jax.random.split(jax.random.key(L), 4)
    q, k, v, weights = (
        jax.random.normal(key, (2, L, heads, Dh)) for key, heads in zip(keys, (4, 2, 2, 4))
    )
    ends = np.array([1, 4, L // 2 - 1, L - 3])
    first = 1 + np.searchsorted(ends, np.arange(L), side="right")
    return q, k, v, weights, np.stack([first, np.arange(L) < L - 5]).astype(np.int32)


@pytest.mark.parametrize(
    ("backend", "shape", "L", "Dh"),
    [
        ("xla", (1, 2, 4, 1), 24, 8),
        ("chunked", (2, 1, 2, 2), 200, 8),
        ("splash", (1, 1, 2, 1), 256, 64),
        pytest.param(
            "splash", (1, 2, 4, 1), 1024, 64, marks=[pytest.mark.long, pytest.mark.little_effort]
        ),
    ],
)
def test_every_kernel_sees_the_keys_of_all_devices(backend, shape, L, Dh, device_mesh):
    *inputs, segments = _inputs(L, Dh)
    devices = shape[2]

    def both_ways(backend, mesh, inputs, segments):
        q, k, v, weights = inputs
        out, pull = jax.vjp(lambda *heads: attend(*heads, segments, backend, mesh), q, k, v)
        return out, *pull(weights)

    run = jax.jit(both_ways, static_argnums=(0, 1))
    expected = run("xla", None, inputs, segments)
    order = slots(L, devices)
    ordered = [x[:, order] for x in inputs], segments[:, order]
    for one, other in zip(run(backend, device_mesh(shape), *ordered), expected, strict=True):
        np.testing.assert_allclose(in_sequence_order(one, 1, devices), other, atol=2e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mesh.context": 8}, "train.seq_len=24 does not divide into 16 chunks, two for each of"),
        ({"mesh.context": 8}, "of mesh axis context; change it, or mesh.context"),
        (
            {"mesh.context": 4, "model.attention": "splash"},
            "takes no sequences of 24 tokens (train.seq_len) over mesh.context=4, only multiples of"
            " 512; change it, or use auto",
        ),
        ({"mesh.context": 0}, "mesh.context, mesh.tensor=(-1, 1, 0, 1): each must be at least 1"),
        ({"tables.vocab_axes": ("tensor",)}, "must be a selection of data, fsdp, context"),
    ],
)
def test_what_context_cannot_divide_is_refused(keys, message, tiny_config, device_mesh):
    with pytest.raises(InputError, match=re.escape(message)):
        config = tiny_config(**LENGTH, **keys)
        check_mesh(config, device_mesh((1, 1, config.mesh.context, 1)))


def test_a_trained_run_is_read_without_the_axis(tiny_config):
    config = tiny_config(**LENGTH, **{"mesh.context": 4, "tables.vocab_axes": ("fsdp", "context")})
    for devices in (1, 2):
        placed, mesh = inference_mesh(config, devices)
        assert placed.mesh.context == mesh.shape["context"] == 1 and mesh.size == devices


@pytest.mark.long
@pytest.mark.little_effort
def test_a_run_goes_on_with_another_context(train_step, make_batch, updates, tmp_path):
    before, _, _, _ = updates(TWO)
    state, losses = _fresh(before), []
    info = CheckpointInfo(1, 1, 0, {}, "none", {}, before.config)
    for seed in range(3):
        batch = make_batch(before, seed=seed)
        state, metrics = before.update(state, batch, make_schedule(before.config, 8))
        losses.append(float(metrics["loss"]))
        if seed == 0:
            with Checkpointer(tmp_path) as checkpoints:
                checkpoints.save(state, info, None)
                checkpoints.wait()
    for shape in (ALONE, ROWS_TOO):
        step, found = updates(shape)[0], []
        with Checkpointer(tmp_path, read_only=True) as checkpoints:
            state = checkpoints.restore(1, abstract_state(step.blueprint))
        for seed in (1, 2):
            batch = make_batch(step, seed=seed)
            state, metrics = step.update(state, batch, make_schedule(step.config, 8))
            found.append(float(metrics["loss"]))
        np.testing.assert_allclose(found, losses[1:], rtol=0, atol=1e-5)


@pytest.mark.long
def test_rows_in_host_memory_change_no_bit(train_step, tmp_path):
    """Rows over shards, their columns in parts, and copies of both along context."""
    sizes = SIZES | {"train.steps": 20, "eval.every": 10, "checkpoint.every": 0}
    sizes |= {"model.num_layers": 1, "model.stem_layers": (0,)}
    shape = (1, 2, 2, 2)
    alone, resident, offloaded = (
        run(train_step(mesh, **sizes, **rows), tmp_path / str(number))
        for number, (mesh, rows) in enumerate(
            [(ALONE, {}), (shape, {}), (shape, {"tables.resident_rows": 512})]
        )
    )
    offloaded.assert_equals(resident)
    assert offloaded.total("table/evictions") > 100
    for metric in ("train/loss", "eval/loss"):
        expected, found = alone.values(metric), offloaded.values(metric)
        assert expected.keys() == found.keys() and len(found) > 1
        np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=0, atol=1e-5)


@pytest.mark.long
def test_a_device_needs_less_memory_the_more_there_are(tiny_config):
    """On four chips, as many tokens an update: a sequence on each, or a quarter at a time."""
    pytest.importorskip("libtpu")
    sizes = {"embed_dim": 256, "head_dim": 64, "ffn_dim": 512, "num_layers": 2, "stem_layers": (1,)}
    keys = {f"model.{name}": value for name, value in sizes.items()}
    keys |= {"model.compute_dtype": "bfloat16", "train.seq_len": 4096, "train.global_batch_size": 4}
    temporaries = []
    for context in (1, 4):
        split = {"mesh.data": -1, "mesh.context": context, "train.micro_batches": context}
        config = tiny_config(**keys, **split)
        mesh = make_mesh(config.mesh, Topology.parse("v5e:2x2").devices())
        compiled = compile_program(train_step_program(config, mesh), full_effort=False)
        temporaries.append(compiled.memory.temporaries)
    # Seen: 68.2 and 34.7 MiB. Keys and values of the whole sequence stay.
    assert temporaries[1] < 0.6 * temporaries[0]
