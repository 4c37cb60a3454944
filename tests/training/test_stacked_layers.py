"""Parameters of scanned layers: stacked in a training state, by layer everywhere else."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.origin import Origin, begin_from
from stem_jax.checkpoints.params import saved_params
from stem_jax.model.layer_plan import (
    by_layer,
    layer_kinds,
    layer_names,
    repeating_groups,
    stack_and_free,
    stack_names,
    stacked,
)
from stem_jax.training.blueprint import ModelDef
from stem_jax.training.optimizer import make_optimizer
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import abstract_state, init_state

# Layers d s d s d: two groups and one alone.
SIZES = {"model.num_layers": 5, "model.stem_layers": (1, 3), "optimizer.weight_decay": 0.3}
SCANNED = SIZES | {"model.scan_layers": True}


def advance(step, state, make_batch, first: int, last: int):
    schedule = make_schedule(step.config, 8)
    for seed in range(first, last):
        state, metrics = step.update(state, make_batch(step, seed), schedule)
    return state, float(metrics["loss"])


def _numpy(stack, index: int) -> np.ndarray:
    return np.asarray(stack)[index]


def save(folder, step, state) -> None:
    number = int(state.step)
    info = CheckpointInfo(number, int(state.updates), 0, {}, "none", {}, step.config)
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(state, info, None)
        checkpoints.wait()


def assert_same(found, expected, **tolerance) -> None:
    """Parameters and optimizer state, by layer."""
    found, expected = (
        by_layer((state.params, state.opt_state), _numpy) for state in (found, expected)
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, value), other in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(value, other, err_msg=name, **{"rtol": 0, "atol": 0} | tolerance)


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_names_say_which_layers_are_stacked(tiny_config, kinds):
    stem = tuple(layer for layer, is_stem in enumerate(kinds) if is_stem) or "none"
    config = tiny_config(**{"model.num_layers": len(kinds), "model.stem_layers": stem}).model
    groups = repeating_groups(layer_kinds(config))
    names = ["norm.scale", *(f"blocks.{layer}.ffn.kernel" for layer in range(len(kinds)))]
    whole = stack_names(names, groups)
    assert sorted(layer for name in whole for layer in layer_names(name)) == sorted(names)
    assert stack_names(names, None) == names
    saved = 0 if groups is None else groups.period * (groups.repeats - 1)
    assert len(whole) == len(names) - saved
    # The layers of a stack are of one kind.
    for name in whole:
        places = re.findall(r"blocks\.(\d+)", " ".join(layer_names(name)))
        assert len({kinds[int(place)] for place in places}) <= 1


def test_there_and_back(tiny_config):
    model = ModelDef(tiny_config(**SCANNED))
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.random(p.shape)) for name, p in model.shapes().items()}
    count, whole, *nothing = stacked((jnp.int32(3), params, None), model.state_names)
    assert count == 3 and nothing == [None]
    assert list(whole) == model.state_names and len(whole) < len(params)
    assert whole["blocks.1:5:2.attention_norm.scale"].shape == (2, 32)
    assert {name: value.shape for name, value in whole.items()} == {
        name: value.shape for name, value in model.state_shapes().items()
    }
    for again in (by_layer(whole), by_layer(params)):
        assert again.keys() == params.keys()
        for name, value in params.items():
            np.testing.assert_array_equal(again[name], value, err_msg=name)


@pytest.mark.parametrize("decay_mask", ["all", "matrices"])
def test_the_same_parameters_decay(tiny_config, decay_mask):
    """A stack of norm scales is [layers, D], and a scale is no matrix for that."""
    decays = {}
    for scan in (False, True):
        config = tiny_config(**SIZES | {"model.scan_layers": scan})
        model = ModelDef(config)
        optimizer = dataclasses.replace(config.optimizer, decay_mask=decay_mask)
        optimizer = make_optimizer(optimizer, model.axes_of)
        shapes = model.state_shapes()
        ones, zeros = ({n: np.full(p.shape, k, "f4") for n, p in shapes.items()} for k in (1, 0))
        # The way that gradients of zero move parameters is their decay alone.
        moved, _ = jax.jit(lambda g, p, o=optimizer: o.update(g, o.init(p), p))(zeros, ones)
        decays[scan] = {n: bool(np.any(move)) for n, move in by_layer(moved, _numpy).items()}
    assert decays[True] == decays[False]
    shapes = ModelDef(tiny_config(**SIZES)).shapes()
    every = decay_mask == "all"
    assert decays[True] == {name: every or len(p.shape) > 1 for name, p in shapes.items()}


@pytest.mark.parametrize("shape", [pytest.param((1, 1, 1), marks=pytest.mark.long), (2, 2, 2)])
def test_a_state_begins_with_the_same_bits_in_their_places(train_step, shape):
    step, plain = train_step(shape, **SCANNED), train_step(shape, **SIZES)
    state = init_state(step.blueprint)
    assert_same(state, init_state(plain.blueprint))
    adam = state.opt_state[0]
    for name, value in state.params.items():
        layer, *others = layer_names(name)
        spec = plain.model.specs()[layer]
        assert tuple(value.sharding.spec) == ((None, *spec) if others else tuple(spec)), name
        assert adam.mu[name].sharding == adam.nu[name].sharding == value.sharding, name
        assert step.shardings.params[name] == value.sharding
    abstract = abstract_state(step.blueprint)
    assert jax.tree.map(lambda x: (x.shape, x.sharding), state.params) == jax.tree.map(
        lambda x: (x.shape, x.sharding), abstract.params
    )


def test_layers_that_were_stacked_are_gone(device_mesh):
    """What a run begins with, or a checkpoint gave, does not stay beside the state."""
    place = NamedSharding(device_mesh((2, 2, 2)), PartitionSpec("fsdp", "tensor"))
    values = np.arange(3 * 4 * 6, dtype=np.float32).reshape(3, 4, 6)
    layers = [jax.device_put(value, place) for value in values]
    whole = stack_and_free(layers)
    np.testing.assert_array_equal(whole, values)
    assert all(layer.is_deleted() for layer in layers)
    assert whole.sharding == NamedSharding(place.mesh, PartitionSpec(None, *place.spec))


@pytest.fixture(scope="module")
def trained(train_step, make_batch, tmp_path_factory):
    """By whether layers are scanned: a folder with a checkpoint of step 2, and its state."""
    found = {}
    for scan, shape in ((False, (1, 1, 1)), (True, (2, 2, 2))):
        step = train_step(shape, **(SCANNED if scan else SIZES))
        state = init_state(step.blueprint)
        state, _ = advance(step, state, make_batch, 0, 2)
        folder = tmp_path_factory.mktemp("trained") / str(scan)
        save(folder, step, state)
        found[scan] = folder, jax.device_get(state)
    return found


def test_a_checkpoint_is_by_layer(trained, tiny_config):
    """Nothing in it tells how the state was held."""
    shapes = ModelDef(tiny_config(**SIZES)).shapes()
    described = {}
    for scan, (folder, _) in trained.items():
        for item in ("params", "opt_state"):
            path = folder / "checkpoints" / "2" / item / "_METADATA"
            described[scan, item] = json.loads(path.read_text())["tree_metadata"]
    for item in ("params", "opt_state"):
        assert described[True, item].keys() == described[False, item].keys()
    found = {entry["key_metadata"][0]["key"] for entry in described[True, "params"].values()}
    assert found == set(shapes)


@pytest.mark.parametrize(
    ("before", "after", "shape"),
    [
        (True, False, (1, 1, 1)),
        (False, True, (2, 2, 2)),
        pytest.param(True, True, (1, 1, 1), marks=[pytest.mark.long, pytest.mark.little_effort]),
    ],
)
def test_a_run_goes_on_scanned_or_not(trained, train_step, make_batch, before, after, shape):
    """On another mesh, too: the state is there bit for bit, and steps go on as they would have."""
    folder, saved = trained[before]
    step = train_step(shape, **(SCANNED if after else SIZES))
    with Checkpointer(folder, read_only=True) as checkpoints:
        target = abstract_state(step.blueprint)
        state = checkpoints.restore(2, target)
        params, _ = checkpoints.restore_model(2, target)
    assert_same(state, saved)
    assert jax.tree.map(lambda x: x.sharding, state.params) == step.shardings.params
    # Whoever asks for the model alone has it by layer.
    assert params.keys() == step.model.shapes().keys()
    plain = train_step((1, 1, 1), **SIZES)
    with Checkpointer(folder, read_only=True) as checkpoints:
        target = abstract_state(plain.blueprint)
        expected = checkpoints.restore(2, target)
    state, loss = advance(step, state, make_batch, 2, 4)
    expected, expected_loss = advance(plain, expected, make_batch, 2, 4)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert_same(state, expected, atol=1e-6)


def test_a_new_run_begins_with_either(trained, train_step):
    for scan, (folder, saved) in trained.items():
        step = train_step((1, 1, 1), **(SIZES if scan else SCANNED))
        with Checkpointer(folder, read_only=True) as checkpoints:
            origin = Origin("train.init_from", folder, checkpoints.info(2))
        state, _ = begin_from(origin, step)
        assert state.params.keys() == set(step.model.state_names)
        found = by_layer(state.params, _numpy)
        for name, value in by_layer(saved.params, _numpy).items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_save_takes_layers_to_the_host_one_by_one(train_step, monkeypatch):
    """What devices hold meanwhile is the state and one layer's array, which all of them bring."""
    step = train_step((2, 2, 2), **SCANNED)
    state = init_state(step.blueprint)
    stacks = {name for name in state.params if len(layer_names(name)) > 1}
    before = {id(array) for array in jax.live_arrays()}
    alive = []
    put = jax.device_put

    def watched(array, place):
        new = [a for a in jax.live_arrays() if id(a) not in before and a.nbytes]
        alive.append(sum(a.nbytes for a in new if a.sharding.memory_kind != "pinned_host"))
        return put(array, place)

    monkeypatch.setattr(jax, "device_put", watched)
    saved, expected = saved_params(state.params), by_layer(state.params, _numpy)
    for name in stacks:
        for layer in layer_names(name):
            assert saved[layer].sharding.memory_kind == "pinned_host"
            np.testing.assert_array_equal(saved[layer], expected[layer])
            # Two devices of `data` have the same; each brings half.
            parts = [shard.data.nbytes for shard in saved[layer].addressable_shards]
            assert sum(parts) == saved[layer].nbytes
    largest = max(value[0].nbytes for name, value in state.params.items() if name in stacks)
    assert len(alive) == 8 * 2 * len(stacks)
    # An array and its parts on each device are listed; they are the same memory.
    assert max(alive) <= 2 * largest
    assert all(saved[name] is state.params[name] for name in state.params.keys() - stacks)


def _update(step, make_batch):
    """The update of a step, ready to compile, and the shapes of what its state stacks."""
    state = abstract_state(step.blueprint)
    shapes = {p.shape for name, p in state.params.items() if len(layer_names(name)) > 1}
    assert {(2, 32, 48), (2, 32)} <= shapes
    return step.update.lower(state, make_batch(step), make_schedule(step.config, 4)), shapes


def test_a_step_does_not_stack_parameters(train_step, make_batch):
    """Copies of all weights, once a step, if the state held them by layer."""
    lowered, shapes = _update(train_step((1, 1, 1), **SCANNED), make_batch)
    text = lowered.as_text()
    for shape in shapes:
        result = "x".join(map(str, shape))
        assert f"tensor<{result}xf32>" in text
        assert not re.findall(rf"stablehlo.concatenate.*-> tensor<{result}xf32>", text)


@pytest.mark.long
def test_a_compiled_step_takes_no_gradients_apart(train_step, make_batch):
    lowered, shapes = _update(train_step((1, 1, 1), **SCANNED), make_batch)
    text = lowered.compile().as_text()
    for shape in shapes:
        dims = ",".join(map(str, shape))
        assert f"f32[{dims}]" in text
        assert not re.findall(rf"f32\[{dims}\]\S* concatenate\(", text)
        # A layer at a place that is known beforehand: not one that the scan takes.
        layer = ",".join(("1", *map(str, shape[1:])))
        assert not re.findall(rf"f32\[{layer}\]\S* slice\(", text)
