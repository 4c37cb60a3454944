"""The official PyTorch code's outputs from its weights: forward, gradients, training, schedules."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.errors import InputError
from stem_jax.interop.names import (
    STEM_PREFIX,
    official_shapes,
    official_to_params,
    params_to_official,
    rows_to_table,
    table_to_rows,
)
from stem_jax.tables.spec import TableState, logical, stored
from stem_jax.training.batch import Batch
from stem_jax.training.blueprint import ModelDef
from stem_jax.training.schedule import make_schedule, multiplier
from stem_jax.training.state import TrainState
from stem_jax.training.step import TrainStep
from tests.stem_inputs import stem_inputs

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
MODELS = ["stem_small", "stem_gqa", "dense_small"]
RUNS = ["stem_small_train5", "stem_small_train5_clip", "stem_small_train5_cosine"]
# Two independent float32 implementations differ by up to 4e-6 in the logits, 5e-7 in the losses and
# 3e-5 in the parameters after five steps.
LOGITS, HIDDEN, LOSS, GRADIENT, NORM, PARAMETER = 2e-5, 3e-5, 1e-5, 1e-4, 1e-5, 1e-4


@functools.cache
def _stored(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


@functools.cache
def _notes(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def _state_dict(name: str, place: str = "") -> dict[str, np.ndarray]:
    """The stored tensors under `place`: "" for the parameters, else "grad/" or "final/"."""
    found = {}
    for key, value in _stored(name).items():
        folder, slash, weight = key.rpartition("/")
        if folder + slash == place and weight.endswith(".weight"):
            found[weight] = value
    return found


def _overrides(name: str, **changes) -> dict:
    """The configuration of a model or of a run from the notes beside its tensors."""
    model, size = _notes(name)["model"], _stored(name)["tokens"].shape
    derived = _notes(name.partition("_train5")[0])["derived"]
    overrides = {
        "model.vocab_size": model["vocab_size"],
        "model.embed_dim": model["dim"],
        "model.num_layers": model["n_layers"],
        "model.num_heads": model["n_heads"],
        "model.num_kv_heads": derived["n_kv_heads"],
        "model.ffn_dim": derived["hidden_dim"],
        "model.stem_layers": tuple(model.get("stem_layers", ())) or "none",
        "model.tie_embeddings": model["weight_tying"],
        "model.norm_eps": model["norm_eps"],
        "model.rope_theta": model["rope_theta"],
        "model.init_std_factor": model["init_std_factor"],
        "tables.pad_multiple": 256,
        "tables.optimizer": "dense_adamw",
        "train.global_batch_size": size[-2],
        "train.seq_len": size[-1],
    }
    if optim := _notes(name).get("optim"):
        overrides |= {
            "optimizer.learning_rate": optim["lr"],
            "optimizer.weight_decay": optim["weight_decay"],
            "optimizer.epsilon": optim["epsilon"],
            "optimizer.beta1": optim["beta1"],
            "optimizer.beta2": optim["beta2"],
            "optimizer.clip_norm": optim["clip"],
            "tables.clip_norm": optim["clip"],
            "optimizer.schedule": optim["scheduler"],
            "optimizer.warmup_steps": optim["warmup"],
            "optimizer.min_lr_ratio": optim["lr_min_ratio"],
            "train.steps": _notes(name)["n_steps"],
        }
    return overrides | changes


def _batch(step: TrainStep, tokens_BxL, targets_BxL) -> Batch:
    B, L = tokens_BxL.shape
    fields = (
        tokens_BxL,
        targets_BxL,
        np.broadcast_to(np.arange(L, dtype=np.int32), (B, L)),
        np.ones((B, L), np.int32),
        np.ones((B, L), bool),
    )
    return Batch(*(jax.device_put(field[None], step.batch_sharding) for field in fields))


def _initial_state(step: TrainStep, name: str) -> TrainState:
    """A state before the first update, with the stored parameters."""
    params, table = official_to_params(_state_dict(name), step.config.model)
    zero = np.int32(0)
    opt_state = step.model.optimizer.init(params)
    touched = dict.fromkeys(step.reads.specs, zero)
    state = TrainState(zero, zero, zero, touched, params, opt_state, {})
    if table is not None:
        rows = stored(table_to_rows(table, step.reads.specs["stem"].layout))
        empty = np.zeros_like(rows)
        slots = TableState(rows, empty, empty, np.zeros(rows.shape[1], np.int32))
        state = dataclasses.replace(state, tables={"stem": slots})
    return jax.device_put(state, step.shardings)


def _official(step: TrainStep, params, rows, name: str) -> dict[str, np.ndarray]:
    """Our arrays under the official names, with the prefix that the stored ones have."""
    table = (
        None
        if rows is None
        else rows_to_table(logical(np.asarray(rows)), step.reads.specs["stem"].layout)
    )
    prefix = STEM_PREFIX if step.config.model.stem_layers else ""
    return params_to_official(jax.device_get(params), table, step.config.model, prefix)


def _close(actual, expected, tolerance: float, what: str):
    difference = np.max(np.abs(np.asarray(actual) - expected))
    assert difference <= tolerance, f"{what} differs by {difference:.2e}, allowed {tolerance:.0e}"


@pytest.mark.parametrize("name", MODELS)
def test_forward(name, train_step):
    step, stored = train_step(**_overrides(name)), _stored(name)
    params, table = official_to_params(_state_dict(name), step.config.model)
    batch = _batch(step, stored["tokens"], stored["targets"])
    tokens = batch.tokens[0]
    # The block of rows is the whole table by token id, so a token is its own index.
    rows = {} if table is None else {"stem": jnp.asarray(table).swapaxes(0, 1)}

    @jax.jit
    def run(params, rows):
        places = []
        inputs = stem_inputs(tokens, tokens, batch.positions[0], batch.segment_ids[0])
        model = ModelDef(step.config).bind(params)
        hidden = model(inputs, rows, collect=places).hidden
        return model.logits(hidden), places

    logits, places = run(params, rows)
    names = ["embed", *(f"layer{layer}" for layer in range(step.config.model.num_layers))]
    assert {key for key in stored if key.startswith("hidden/")} == {f"hidden/{n}" for n in names}
    for place, hidden in zip(names, places, strict=True):
        _close(hidden, stored[f"hidden/{place}"], HIDDEN, f"hidden/{place}")
    _close(logits, stored["logits"], LOGITS, "logits")


@pytest.mark.parametrize(
    ("name", "mesh", "chunk"),
    [
        ("stem_small", (1, 1, 1), 4096),
        ("stem_small", (1, 2, 2), 7),
        ("stem_gqa", (1, 1, 1), 7),
        ("dense_small", (1, 1, 1), 7),
        ("dense_small", (1, 1, 1), 4096),
    ],
)
def test_loss_and_gradients(name, mesh, chunk, train_step):
    # Unclipped, the first moments after one update are (1 - beta1) times the gradients.
    overrides = _overrides(
        name,
        **{
            "optimizer.clip_norm": 1e9,
            "tables.clip_norm": 1e9,
            "optimizer.learning_rate": 1e-3,
            "train.loss_chunk": chunk,
        },
    )
    step, stored = train_step(mesh, **overrides), _stored(name)
    schedule = make_schedule(step.config, 1, np.full(1, 1e-3))
    batch = _batch(step, stored["tokens"], stored["targets"])
    state, metrics = step.update(_initial_state(step, name), batch, schedule)
    moments, table = state.opt_state[0].mu, state.tables.get("stem")
    gradients = _official(step, moments, None if table is None else table.mu, name)
    expected = _state_dict(name, "grad/")
    assert len(expected) >= 13
    for key, gradient in expected.items():
        largest = np.max(np.abs(gradient))
        ours = gradients[key] / (1 - step.config.optimizer.beta1)
        _close(ours / largest, gradient / largest, GRADIENT, f"gradient of {key}")
    _close(metrics["loss"], stored["loss"], LOSS, "loss")
    assert metrics["grad_norm"] == pytest.approx(stored["grad_norm/lm"], rel=NORM)
    if table is not None:
        assert metrics["table_grad_norm"] == pytest.approx(stored["grad_norm/stem"], rel=NORM)


@pytest.mark.parametrize("optimizer", ["dense_adamw", "deferred_adamw"])
@pytest.mark.parametrize("name", RUNS)
def test_five_steps(name, optimizer, train_step):
    step = train_step(**_overrides(name, **{"tables.optimizer": optimizer}))
    stored = _stored(name)
    schedule = make_schedule(step.config, 5)
    np.testing.assert_allclose(schedule.rates, stored["lr"], rtol=1e-6)
    state = _initial_state(step, "stem_small")
    for index, (tokens, targets) in enumerate(
        zip(stored["tokens"], stored["targets"], strict=True)
    ):
        state, metrics = step.update(state, _batch(step, tokens, targets), schedule)
        _close(metrics["loss"], stored["losses"][index], LOSS, f"loss {index}")
        assert metrics["learning_rate"] == pytest.approx(stored["lr"][index], rel=1e-6)
        for ours, theirs in (("grad_norm", "grad_norm_lm"), ("table_grad_norm", "grad_norm_stem")):
            assert metrics[ours] == pytest.approx(stored[theirs][index], rel=NORM), (ours, index)
    first = _batch(step, stored["tokens"][0], stored["targets"][0])
    total, count = step.evaluate(state, first, schedule)
    _close(total / count, stored["loss_after_on_step0_batch"], LOSS, "loss after the run")
    rows = step.caught_up_rows(state, schedule)["stem"]
    final = _official(step, state.params, rows, name)
    expected = _state_dict(name, "final/")
    assert final.keys() == expected.keys()
    for key, value in expected.items():
        _close(final[key], value, PARAMETER, key)


@pytest.mark.parametrize("case", sorted(_notes("lr_schedules")["cases"]))
def test_schedules(case, tiny_config):
    settings = _notes("lr_schedules")["cases"][case]
    ours = {
        "scheduler": "schedule",
        "warmup": "warmup_steps",
        "lr_min_ratio": "min_lr_ratio",
        "decay_fraction": "decay_fraction",
        "cycle_length": "cycle_length",
        "cosine_theta": "cosine_theta",
    }
    overrides = {f"optimizer.{ours[key]}": settings[key] for key in settings if key in ours}
    optimizer = tiny_config(**overrides).optimizer
    stored = _stored("lr_schedules")[case]
    found = [multiplier(optimizer, settings["n_steps"], step) for step in range(len(stored))]
    _close(np.array(found), stored, 1e-6, case)


@pytest.mark.parametrize("name", MODELS)
def test_names_are_a_bijection(name, tiny_config):
    config, tensors = tiny_config(**_overrides(name)), _state_dict(name)
    params, table = official_to_params(tensors, config.model)
    ours = {key: shape.shape for key, shape in ModelDef(config).shapes().items()}
    assert {key: value.shape for key, value in params.items()} == ours
    prefix = "" if name == "dense_small" else STEM_PREFIX
    assert official_shapes(config.model, prefix) == {k: v.shape for k, v in tensors.items()}
    back = params_to_official(params, table, config.model, prefix)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[key], tensors[key]) for key in tensors)
    again, table_again = official_to_params(back, config.model)
    assert all(np.array_equal(again[key], params[key]) for key in params)
    assert np.array_equal(table_again, table) if table is not None else table_again is None


WQ = "lm_transformer.layers.0.attention.wq.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("stem_embeddings.1.weight"), "stem_embeddings.1.weight is missing"),
        (lambda t: t.update({"lm_transformer.rope": t[WQ]}), "lm_transformer.rope is unknown"),
        (lambda t: t.update({WQ: t[WQ][:, :5]}), r"wq.weight is \(96, 5\), expected \(96, 96\)"),
        (lambda t: t.clear(), "tok_embeddings.weight is missing.* more"),
        (
            lambda t: t.update({k: t[k] + 1 for k in t if "tied_module" in k}),
            "output.tied_module.weight differs from lm_transformer.tok_embeddings.weight",
        ),
    ],
)
def test_wrong_tensors_are_named(change, message, tiny_config):
    tensors = _state_dict("stem_gqa")
    change(tensors)
    with pytest.raises(InputError, match=message):
        official_to_params(tensors, tiny_config(**_overrides("stem_gqa")).model)


@pytest.mark.parametrize(
    ("drop_table", "drop", "message"),
    [(True, None, "table is missing"), (False, "embed.weight", "embed.weight is missing")],
)
def test_wrong_parameters_are_named(drop_table, drop, message, tiny_config):
    config = tiny_config(**_overrides("stem_gqa")).model
    params, table = official_to_params(_state_dict("stem_gqa"), config)
    params.pop(drop, None)
    with pytest.raises(InputError, match=message):
        params_to_official(params, None if drop_table else table, config, STEM_PREFIX)
