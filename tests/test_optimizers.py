"""The backbone's optimizers: where their state lies."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from stem_jax.training.optimizer import apply_update, make_optimizer
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import ModelDef, abstract_state, init_state, state_shardings
from stem_jax.training.step import TrainStep

MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2)]
SMALL = {"model.num_layers": 2, "model.stem_layers": (1,)}
# Layers that are scanned as one group.
DENSE = {"model.num_layers": 2, "model.stem_layers": "none"}


def _labels(params):
    return {name: "lion" if "ffn" in name else "adam" for name in params}


# What might stand in the place of `make_optimizer`, by what is peculiar to its state.
OPTIMIZERS = {
    "moments like their parameters": make_optimizer,
    "one moment": lambda *_: optax.scale_by_lion(),
    "sums over rows and columns": lambda *_: optax.adafactor(1e-3, min_dim_size_to_factor=16),
    "parameters chosen by name": lambda *_: optax.multi_transform(
        {"lion": optax.scale_by_lion(), "adam": optax.scale_by_adam()}, _labels
    ),
    "parameters chosen by shape": lambda *_: optax.contrib.muon(1e-3),
}


def _numbers(shapes, seed: int, shardings=None) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    values = {name: rng.normal(size=s.shape).astype(np.float32) for name, s in shapes.items()}
    return jax.device_put(values, shardings)


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_lies_as_its_parameters_do(tiny_config, device_mesh, monkeypatch, name, shape):
    """It starts and makes a step, on every mesh, and stays where it is."""
    monkeypatch.setattr("stem_jax.training.state.make_optimizer", OPTIMIZERS[name])
    config = tiny_config(**SMALL)
    mesh = device_mesh(shape)
    model = ModelDef(config, mesh)
    places = state_shardings(config, model, mesh)
    shapes = model.state_shapes()
    params = _numbers(shapes, 0, places.params)
    state = init_state(config, model, mesh, params)
    step = jax.jit(
        functools.partial(apply_update, model.optimizer),
        out_shardings=(places.params, places.opt_state),
    )
    params, opt_state = step(
        state.params, state.opt_state, _numbers(shapes, 1, places.params), jnp.float32(0.01)
    )
    described = abstract_state(config, model, mesh)
    for found in (state, dataclasses.replace(state, params=params, opt_state=opt_state)):
        assert jax.tree.structure(found.opt_state) == jax.tree.structure(described.opt_state)
        like_a_parameter = 0
        for path, kept in jax.tree.leaves_with_path(found.opt_state):
            names = [step.key for step in path if getattr(step, "key", None) in shapes]
            own = bool(names) and kept.shape == shapes[names[-1]].shape
            place = places.params[names[-1]] if own else jax.sharding.NamedSharding(mesh, jax.P())
            assert kept.sharding.is_equivalent_to(place, kept.ndim), path
            like_a_parameter += own
        # Of vectors, at least, each has something.
        assert like_a_parameter >= sum(len(s.shape) == 1 for s in shapes.values())
    assert all(np.all(np.isfinite(value)) for value in params.values())


@pytest.mark.long
@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_runs_of_any_optimizer_start(
    tiny_config, device_mesh, make_batch, monkeypatch, name, shape
):
    monkeypatch.setattr("stem_jax.training.state.make_optimizer", OPTIMIZERS[name])
    config = tiny_config()
    step = TrainStep(config, device_mesh(shape))
    state = init_state(step.config, step.model, step.mesh)
    before = jax.device_get(state.params)
    state, metrics = step.update(state, make_batch(step), make_schedule(config, 2))
    assert (state.updates, metrics["bad_steps"]) == (1, 0)
    assert not any(np.array_equal(before[name], value) for name, value in state.params.items())
