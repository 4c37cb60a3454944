"""The backbone's optimizers: where their state lies, what Muon moves, what is frozen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.config_checks import _CHOICES
from stem_jax.config_file import load_config
from stem_jax.errors import InputError
from stem_jax.model.layer_plan import by_layer, layer_names
from stem_jax.run_checks import check_first_start
from stem_jax.training.blueprint import Blueprint, ModelDef
from stem_jax.training.optimizer import _DIRECTIONS, apply_update, make_optimizer
from stem_jax.training.resume import check_continuable, check_resumable
from stem_jax.training.schedule import make_schedule
from stem_jax.training.start_report import describe_run
from stem_jax.training.state import abstract_state, init_state, state_shardings
from stem_jax.training.step import TrainStep

MESHES = [(1, 1, 1), pytest.param((8, 1, 1), marks=pytest.mark.long), (2, 2, 2)]
MUON = {"optimizer.name": "muon", "optimizer.weight_decay": 0.3}
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
@pytest.mark.parametrize("name", [*OPTIMIZERS, "muon"])
def test_state_lies_as_its_parameters_do(tiny_config, device_mesh, monkeypatch, name, shape):
    """It starts and makes a step, on every mesh, and stays where it is."""
    if name in OPTIMIZERS:
        monkeypatch.setattr("stem_jax.training.blueprint.make_optimizer", OPTIMIZERS[name])
    config = tiny_config(**SMALL, **{"optimizer.name": "muon" if name == "muon" else "adamw"})
    mesh = device_mesh(shape)
    blueprint = Blueprint(config, mesh)
    model, places = blueprint.model, state_shardings(blueprint)
    shapes = model.state_shapes()
    params = _numbers(shapes, 0, places.params)
    state = init_state(blueprint, params)
    step = jax.jit(
        functools.partial(apply_update, model.optimizer),
        out_shardings=(places.params, places.opt_state),
    )
    params, opt_state = step(
        state.params, state.opt_state, _numbers(shapes, 1, places.params), jnp.float32(0.01)
    )
    described = abstract_state(blueprint)
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
@pytest.mark.little_effort
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, (2, 2, 2)) for name in [*OPTIMIZERS, "muon"]),
        ("one moment", (1, 1, 1)),
        ("muon", (8, 1, 1)),
    ],
)
def test_runs_of_any_optimizer_start(
    tiny_config, device_mesh, make_batch, monkeypatch, name, shape
):
    if name in OPTIMIZERS:
        monkeypatch.setattr("stem_jax.training.blueprint.make_optimizer", OPTIMIZERS[name])
    config = tiny_config(**SMALL, **{"optimizer.name": "muon" if name == "muon" else "adamw"})
    step = TrainStep(config, device_mesh(shape))
    state = init_state(step.blueprint)
    before = jax.device_get(state.params)
    state, metrics = step.update(state, make_batch(step), make_schedule(config, 2))
    assert (state.updates, metrics["bad_steps"]) == (1, 0)
    assert not any(np.array_equal(before[name], value) for name, value in state.params.items())


def _direction(config, shapes, axes_of, gradients, params):
    """Of two updates, with the gradients and with their halves."""
    optimizer = make_optimizer(config.optimizer, axes_of)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    found = []
    for factor in (1.0, 0.5):
        moved, state = update({n: factor * g for n, g in gradients.items()}, state, params)
        found.append(moved)
    return found


def test_muon_moves_the_matrices_of_blocks_and_adamw_the_others(tiny_config):
    config = tiny_config(**MUON | SMALL)
    model = ModelDef(config)
    shapes = model.state_shapes()
    params, gradients = (_numbers(shapes, seed) for seed in (0, 1))
    of_blocks = {n for n, s in shapes.items() if n.startswith("blocks.") and len(s.shape) == 2}
    assert len(of_blocks) == 2 * 4 + 2 * 2 + 1
    adamw = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, name="adamw")
    )
    theirs = optax.contrib.muon(-1.0, weight_decay=0.3, consistent_rms=0.2, eps=1e-8)
    state = theirs.init(params)
    ours, plain = (_direction(c, shapes, model.axes_of, gradients, params) for c in (config, adamw))
    for moved, adam, factor in zip(ours, plain, (1.0, 0.5), strict=True):
        scaled = {n: factor * g for n, g in gradients.items()}
        expected, state = jax.jit(theirs.update)(scaled, state, params)
        for name in shapes:
            if name in of_blocks:
                np.testing.assert_allclose(moved[name], expected[name], rtol=2e-5, atol=2e-6)
                assert not np.allclose(moved[name], adam[name], atol=0.01)
            else:
                np.testing.assert_array_equal(moved[name], adam[name], err_msg=name)


def _orthogonal(gradient_MxN: np.ndarray) -> np.ndarray:
    """Newton-Schulz as published, with entries of the same size for all shapes."""
    x = gradient_MxN.astype(np.float64)
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return 0.2 * max(x.shape) ** 0.5 * x


def test_each_layer_and_each_expert_is_a_matrix_of_its_own(tiny_config):
    config = tiny_config(**MUON | {"optimizer.weight_decay": 0.0})
    axes = {
        "one": ("embed", "ffn"),
        "layers": ("layers", "embed", "ffn"),
        "experts": ("experts", "embed", "ffn"),
        "both": ("layers", "experts", "ffn", "embed"),
    }
    shapes = {
        "one": (24, 16),
        "layers": (4, 16, 24),
        "experts": (4, 24, 16),
        "both": (2, 3, 24, 16),
    }
    rng = np.random.default_rng(0)
    gradients = {
        name: rng.normal(size=shape) * rng.uniform(0.1, 10, (*shape[:-2], 1, 1))
        for name, shape in shapes.items()
    }
    gradients = jax.tree.map(np.float32, gradients)
    optimizer = make_optimizer(config.optimizer, axes.get)
    update = jax.jit(lambda g: optimizer.update(g, optimizer.init(g), g)[0])
    for name, moved in update(gradients).items():
        size = shapes[name][-2:]
        for found, gradient in zip(
            moved.reshape(-1, *size), gradients[name].reshape(-1, *size), strict=True
        ):
            np.testing.assert_allclose(found, _orthogonal(gradient), atol=2e-4, err_msg=name)


def test_muon_is_the_same_for_scanned_layers(tiny_config):
    config = tiny_config(**MUON | DENSE)
    scanned = tiny_config(**MUON | DENSE | {"model.scan_layers": True})
    model, stacks = ModelDef(config), ModelDef(scanned)
    shapes = model.state_shapes()
    params, gradients = (_numbers(shapes, seed) for seed in (0, 1))

    def stacked(by_name):
        return {
            name: np.stack([by_name[layer] for layer in layers])
            if len(layers) > 1
            else by_name[name]
            for name in stacks.state_names
            for layers in [layer_names(name)]
        }

    expected = _direction(config, shapes, model.axes_of, gradients, params)
    found = _direction(scanned, shapes, stacks.axes_of, stacked(gradients), stacked(params))
    for one, other in zip(found, expected, strict=True):
        one = by_layer(one)
        for name, value in other.items():
            np.testing.assert_allclose(one[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def _steps(step, state, make_batch, first: int, last: int):
    for number in range(first, last):
        batch = make_batch(step, seed=number)
        state, metrics = step.update(state, batch, make_schedule(step.config, 8))
    return state, metrics


def _save(folder, step, state) -> None:
    counts = map(int, (state.step, state.updates, state.bad_steps))
    touched = {name: int(n) for name, n in state.touched_rows.items()}
    info = CheckpointInfo(*counts, touched, "none", {}, step.config)
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(state, info, None)
        checkpoints.wait()


def _restored(folder, number, step):
    with Checkpointer(folder, read_only=True) as checkpoints:
        return checkpoints.restore(number, abstract_state(step.blueprint))


def _assert_same(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, value), other in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(value, other, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("scan", [False, True])
def test_muon_resumes_bit_for_bit(train_step, make_batch, tmp_path, scan):
    """Its checkpoint is by layer, whatever the state stacks."""
    step = train_step(**MUON | DENSE | {"model.scan_layers": scan})
    state = init_state(step.blueprint)
    state, _ = _steps(step, state, make_batch, 0, 2)
    _save(tmp_path, step, state)
    again = _restored(tmp_path, 2, step)
    _assert_same(again, state)
    state, _ = _steps(step, state, make_batch, 2, 4)
    again, _ = _steps(step, again, make_batch, 2, 4)
    _assert_same(again, state)
    other = train_step(**MUON | DENSE | {"model.scan_layers": not scan})
    found = _restored(tmp_path, 2, other)
    _assert_same(by_layer(found.opt_state), by_layer(_restored(tmp_path, 2, step).opt_state))


@pytest.mark.parametrize(
    ("trained", "micro_batches"),
    [
        ("tables", 2),
        ("backbone", 1),
        pytest.param("tables", 1, marks=[pytest.mark.long, pytest.mark.little_effort]),
        pytest.param("backbone", 2, marks=[pytest.mark.long, pytest.mark.little_effort]),
    ],
)
def test_the_rest_keeps_its_bits(train_step, make_batch, tmp_path, trained, micro_batches):
    keys = {"train.micro_batches": micro_batches, "optimizer.weight_decay": 0.3}
    keys |= SMALL
    step = train_step(**keys | {"optimizer.train": trained})
    whole = train_step(**keys)
    state = init_state(step.blueprint)
    before = jax.device_get(state)
    first, metrics = _steps(step, state, make_batch, 0, 1)
    first = jax.device_get(first)
    state = init_state(whole.blueprint)
    reference, of_all = _steps(whole, state, make_batch, 0, 1)
    # The part that trains moves as it would with the other; each is clipped by its own norm.
    norms = {"tables": "table_grad_norm", "backbone": "grad_norm"}
    np.testing.assert_allclose(metrics[norms[trained]], of_all[norms[trained]], rtol=1e-5)
    assert not norms.keys() - {trained} & {k for k in norms if norms[k] in metrics}
    if trained == "tables":
        _assert_same(first.params, before.params)
        np.testing.assert_allclose(
            first.tables["stem"].rows, reference.tables["stem"].rows, atol=1e-5
        )
        # A count alone.
        assert [kept.shape for kept in jax.tree.leaves(first.opt_state)] == [()]
    else:
        _assert_same(first.tables, before.tables)
        for name, value in reference.params.items():
            np.testing.assert_allclose(first.params[name], value, atol=1e-5, err_msg=name)
    state = jax.device_put(first, step.shardings)
    _save(tmp_path, step, state)
    again = _restored(tmp_path, 1, step)
    _assert_same(again, state)
    state, _ = _steps(step, state, make_batch, 1, 4)
    again, _ = _steps(step, again, make_batch, 1, 4)
    _assert_same(again, state)
    frozen = "params" if trained == "tables" else "tables"
    _assert_same(getattr(state, frozen), getattr(before, frozen))
    # What all readers of a run have.
    if trained == "backbone":
        rows = step.caught_up_rows(state, make_schedule(step.config, 8))["stem"]
        np.testing.assert_array_equal(rows, before.tables["stem"].rows)


def test_the_report_counts_what_the_optimizer_keeps(tiny_config, device_mesh):
    keys = {"model.embed_dim": 256, "model.ffn_dim": 512}
    mesh = device_mesh((1, 1, 1))

    def mebibytes(**overrides) -> float:
        config = tiny_config(**keys | overrides)
        report = describe_run(Blueprint(config, mesh))
        [line] = [line for line in report.splitlines() if line.startswith("memory ")]
        return float(line.partition("backbone with optimizer ")[2].split()[0])

    shapes = ModelDef(tiny_config(**keys)).shapes()
    size = {name: 4 * np.prod(s.shape) / 2**20 for name, s in shapes.items()}
    whole = sum(size.values())
    matrices = sum(
        size[name] for name, s in shapes.items() if "blocks" in name and len(s.shape) > 1
    )
    assert mebibytes() == pytest.approx(3 * whole, abs=0.06)
    found = mebibytes(**{"optimizer.name": "muon"})
    assert found == pytest.approx(3 * whole - matrices, abs=0.06)
    found = mebibytes(**{"optimizer.train": "tables"})
    assert found == pytest.approx(whole, abs=0.06)


@pytest.mark.parametrize(
    ("key", "value"), [("optimizer.name", "muon"), ("optimizer.train", "tables")]
)
def test_a_run_keeps_its_optimizer(tiny_config, tmp_path, key, value):
    before, now = tiny_config(), tiny_config(**{key: value})
    for check in (
        lambda: check_resumable(before, now, 1),
        lambda: check_continuable(tmp_path, 1, before, now),
    ):
        with pytest.raises(InputError, match=rf"{key}: '.*' -> '{value}'.*--config\.{key}="):
            check()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimizer.name": "lion"}, "optimizer.name='lion' is unknown; choose one of adamw, muon"),
        ({"optimizer.train": "rows"}, "choose one of all, tables, backbone"),
    ],
)
def test_unknown_values_are_named(overrides, message):
    with pytest.raises(InputError) as refused:
        load_config("configs/tiny.py", overrides)
    assert message in str(refused.value)


def test_a_training_of_nothing_is_refused(tiny_config):
    """Where it starts: a dense model may be configured so before its layers become tables."""
    keys = {"optimizer.train": "tables"}
    check_first_start(tiny_config(**keys))
    with pytest.raises(
        InputError, match=r"optimizer\.train=tables trains nothing.*stem_layers=none"
    ):
        check_first_start(tiny_config(**keys, **{"model.stem_layers": "none"}))


def test_every_name_that_is_offered_is_an_optimizer():
    assert set(_CHOICES["optimizer.name"]) == set(_DIRECTIONS)
