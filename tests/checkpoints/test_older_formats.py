"""Checkpoints of format 2: queries and keys in pairs of adjacent dimensions become halves."""

import dataclasses
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.files import FORMAT_VERSION
from stem_jax.checkpoints.older_formats import _program, current_array
from stem_jax.checkpoints.saved_model import SavedModel
from stem_jax.model.layer_plan import by_layer
from stem_jax.model.rotary import pairs_first
from stem_jax.training.state import abstract_state, init_state

HEADS = {"q_proj": 4, "k_proj": 2}


def _heads(name: str) -> int:
    """Of 4 query and 2 KV heads, those of a parameter that is rotated."""
    return HEADS.get(name.split(".")[-2], 0) if ".attention." in name else 0


def _then(tree):
    """Parameters by name as format 2 has them."""
    return {n: pairs_first(v, _heads(n)) if _heads(n) else v for n, v in tree.items()}


@pytest.fixture(scope="module")
def saved(train_step, tmp_path_factory):
    """A work folder of format 2, and the state that it holds as it is now."""
    step = train_step((8, 1, 1))
    state = init_state(step.blueprint)
    # Moments that differ from the parameters, and from place to place.
    mu, nu = (
        {name: p * 0 + k + jnp.arange(p.size).reshape(p.shape) for name, p in state.params.items()}
        for k in (0.25, 0.5)
    )
    adam, *others = state.opt_state
    state = dataclasses.replace(state, opt_state=(adam._replace(mu=mu, nu=nu), *others))
    then = dataclasses.replace(
        state,
        params=_then(state.params),
        opt_state=(adam._replace(mu=_then(mu), nu=_then(nu)), *others),
    )
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpointer(workdir) as checkpoints:
        checkpoints.save(then, CheckpointInfo(3, 3, 0, {"stem": 0}, "none", {}, step.config), None)
        checkpoints.wait()
    layout = workdir / "checkpoints" / "3" / "layout" / "metadata"
    record = json.loads(layout.read_text())
    assert record["format"] == FORMAT_VERSION
    layout.write_text(json.dumps(record | {"format": 2}))
    return workdir, state


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_parameters_and_moments_come_in_halves_on_any_mesh(saved, train_step, shape):
    workdir, expected = saved
    step = train_step(shape)
    target = abstract_state(step.blueprint)
    with Checkpointer(workdir, read_only=True) as checkpoints:
        found = checkpoints.restore(3, target)
        params, _ = checkpoints.restore_model(3, target)
        info = checkpoints.info(3)
    assert info.format == 2
    for there, here in zip(
        jax.tree.leaves((expected.params, expected.params, expected.opt_state)),
        jax.tree.leaves((found.params, params, found.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(here, there)
    for name, value in found.params.items():
        assert value.sharding == target.params[name].sharding
    alone = SavedModel(workdir / "checkpoints" / "3", info, None)
    for name, value in expected.params.items():
        np.testing.assert_array_equal(alone.param(name), value)


def test_layers_come_in_halves_before_they_are_stacked(saved, train_step):
    workdir, expected = saved
    step = train_step((2, 2, 2), **{"model.scan_layers": True})
    with Checkpointer(workdir, read_only=True) as checkpoints:
        found = checkpoints.restore(3, abstract_state(step.blueprint))
    assert "blocks.1:3:1.attention.q_proj.kernel" in found.params
    for there, here in zip(
        jax.tree.leaves((expected.params, expected.opt_state)),
        jax.tree.leaves(by_layer((found.params, found.opt_state))),
        strict=True,
    ):
        np.testing.assert_array_equal(here, there)


def test_what_is_saved_again_is_read_as_it_is(saved, train_step, tmp_path):
    workdir, expected = saved
    step = train_step((8, 1, 1))
    target = abstract_state(step.blueprint)
    with Checkpointer(workdir, read_only=True) as checkpoints:
        state, info = checkpoints.restore(3, target), checkpoints.info(3)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state, info, None)
        checkpoints.wait()
        assert checkpoints.info(3).format == FORMAT_VERSION
        again = checkpoints.restore(3, target)
    for name, value in expected.params.items():
        np.testing.assert_array_equal(again.params[name], value)


def test_no_device_asks_another(saved, device_mesh):
    """Columns are divided by whole heads, so each has all that it turns; nothing is whole."""
    mesh = device_mesh((2, 2, 2))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    shape = jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=sharding)
    compiled = _program(4, sharding).lower(shape).compile()
    assert not re.search("all-|collective|reduce-scatter", compiled.as_text())
    assert compiled.memory_analysis().argument_size_in_bytes == 32 * 64 * 4 // 4
    assert compiled.memory_analysis().temp_size_in_bytes <= 32 * 64 * 4 // 4


def test_other_parameters_stay():
    model = types.SimpleNamespace(num_heads=4, num_kv_heads=2)
    value = np.arange(64.0).reshape(4, 16)
    for name in ("attention.v_proj", "attention.o_proj", "ffn.up_proj"):
        assert current_array(f"blocks.0.{name}.kernel", value, 2, model) is value
    for version, changes in ((2, True), (3, False)):
        for name in HEADS:
            found = current_array(f"blocks.1.attention.{name}.kernel", value, version, model)
            assert (found is not value) == changes
