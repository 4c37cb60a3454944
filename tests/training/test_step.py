"""The train step: the same on every mesh, whole or in micro-batches; bad batches change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.kernels import row_sums
from stem_jax.mesh import replicated
from stem_jax.tables import block_sizes
from stem_jax.tables.block_sizes import sizes_at
from stem_jax.training import loop
from stem_jax.training import step as step_module
from stem_jax.training.batch import Batch
from stem_jax.training.reads import ReadSizes
from stem_jax.training.schedule import learning_rates, make_schedule
from stem_jax.training.state import abstract_state, init_state
from stem_jax.training.step import TrainStep

MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2)]
RATES = np.full(32, 3e-3)


def schedule(step, rates=RATES):
    """The schedule of a step with these learning rates."""
    return make_schedule(step.config, 32, rates)


@pytest.fixture(scope="module")
def fresh_state(train_step):
    """fresh_state(step): the state of a new run, the same numbers for every mesh."""
    found = {}

    def make(step: TrainStep):
        key = (step.config.model, step.config.train.seed)
        if key not in found:
            found[key] = jax.device_get(init_state(step.blueprint))
        return jax.device_put(found[key], step.shardings)

    return make


def _run(step: TrainStep, state, make_batch, steps: int):
    losses = []
    for index in range(steps):
        state, metrics = step.update(state, make_batch(step, seed=index), schedule(step))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def runs(train_step, fresh_state, make_batch):
    """Twenty steps on every mesh."""
    found = {}
    for shape in MESHES:
        step = train_step(shape)
        found[shape] = (step, *_run(step, fresh_state(step), make_batch, 20))
    return found


def test_losses_do_not_depend_on_the_mesh(runs):
    alone = runs[1, 1, 1][2]
    assert alone[-1] != alone[0]
    for shape in MESHES[1:]:
        np.testing.assert_allclose(runs[shape][2], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", MESHES)
def test_the_state_stays_where_it_belongs(shape, runs):
    step, state, _ = runs[shape]
    expected = jax.tree.leaves(step.shardings)
    for (path, array), sharding in zip(jax.tree.leaves_with_path(state), expected, strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim), jax.tree_util.keystr(path)


def test_the_shards_are_what_the_table_of_axes_says(runs):
    _, state, _ = runs[2, 2, 2]
    # Mesh (2, 2, 2): embed over fsdp, heads, ffn and vocab over tensor, rows over data and fsdp.
    expected = {
        "embed.weight": (88 // 2, 32 // 2),
        "head.kernel": (32 // 2, 88 // 2),
        "blocks.0.attention.q_proj.kernel": (32 // 2, 32 // 2),
        "blocks.0.attention.k_proj.kernel": (32 // 2, 16 // 2),
        "blocks.0.attention.o_proj.kernel": (32 // 2, 32 // 2),
        "blocks.0.ffn.gate_proj.kernel": (32 // 2, 48 // 2),
        "blocks.2.ffn.down_proj.kernel": (32 // 2, 48 // 2),
        "blocks.1.ffn_norm.scale": (32,),
    }
    for parameters in (state.params, state.opt_state[0].mu, state.opt_state[0].nu):
        for name, shape in expected.items():
            assert parameters[name].addressable_shards[0].data.shape == shape, name
    for array in (state.tables["stem"].rows, state.tables["stem"].mu, state.tables["stem"].nu):
        assert array.addressable_shards[0].data.shape == (2, 96 // 4, 48 // 2)
    assert state.tables["stem"].last_step.addressable_shards[0].data.shape == (96 // 4,)


def test_abstract_state_describes_the_state(runs):
    step, state, _ = runs[2, 2, 2]
    abstract = abstract_state(step.blueprint)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for described, array in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (described.shape, described.dtype) == (array.shape, array.dtype)
        assert array.sharding.is_equivalent_to(described.sharding, array.ndim)


def test_a_batch_is_learnt(train_step, fresh_state, make_batch):
    step = train_step()
    state, batch, losses = fresh_state(step), make_batch(step), []
    for _ in range(20):
        state, metrics = step.update(state, batch, schedule(step))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(88), abs=0.7)
    assert losses[-1] < 0.5 * losses[0]


def test_a_step_reports_what_it_did(train_step, fresh_state, make_batch):
    step = train_step()
    batch = make_batch(step, ragged=True)
    rates = np.arange(32) * 1e-4
    state, first = step.update(fresh_state(step), batch, schedule(step, rates))
    state, second = step.update(state, batch, schedule(step, rates))
    assert (first["learning_rate"], second["learning_rate"]) == (0, np.float32(1e-4))
    assert first["tokens"] == np.sum(batch.loss_mask)
    valid = np.asarray(batch.segment_ids) > 0
    assert first["table/distinct_rows"] == len(np.unique(np.asarray(batch.tokens)[valid]))
    assert (state.step, state.updates, state.bad_steps) == (2, 2, 0)
    rows = step.reads.specs["stem"].layout.row_numbers(np.asarray(batch.tokens)[valid])
    assert np.all(np.asarray(state.tables["stem"].last_step)[rows] == 2)


@pytest.mark.parametrize(
    ("shape", "micro_batches"), [pytest.param((1, 1, 1), 4, marks=pytest.mark.long), ((2, 2, 2), 2)]
)
def test_micro_batches_equal_one_batch(shape, micro_batches, train_step, fresh_state, make_batch):
    """Rows of different length: a mean of means would weigh their tokens differently."""
    results = []
    for step in (train_step(shape), train_step(shape, **{"train.micro_batches": micro_batches})):
        batch = make_batch(step, seed=4, ragged=True)
        state, metrics = step.update(fresh_state(step), batch, schedule(step))
        results.append(jax.device_get((state, metrics)))
    (state, metrics), (split, split_metrics) = results
    assert metrics["tokens"] == split_metrics["tokens"]
    assert split_metrics["loss"] == pytest.approx(metrics["loss"], abs=1e-6)
    for name, value in state.params.items():
        np.testing.assert_allclose(split.params[name], value, rtol=0, atol=2e-6, err_msg=name)
    found, table = split.tables["stem"], state.tables["stem"]
    np.testing.assert_allclose(found.rows, table.rows, rtol=0, atol=2e-6)
    # Seen in the gradients themselves: the first moments are a tenth of them.
    np.testing.assert_allclose(found.mu, table.mu, rtol=1e-4, atol=1e-8)


def test_evaluation_adds_up(train_step, fresh_state, make_batch):
    sums = []
    for step in (train_step(), train_step(**{"train.micro_batches": 4})):
        batch, state = make_batch(step, seed=4, ragged=True), fresh_state(step)
        total, count = step.evaluate(state, batch, schedule(step))
        assert count == np.sum(batch.loss_mask)
        sums.append(float(total))
    assert sums[1] == pytest.approx(sums[0], rel=1e-6)
    _, metrics = step.update(state, batch, schedule(step))
    assert metrics["loss"] == pytest.approx(sums[1] / int(count), rel=1e-6)


@pytest.mark.parametrize("where", ["backbone", "table"])
def test_a_bad_batch_changes_nothing(where, train_step, fresh_state, make_batch):
    """A huge value overflows in the forward pass: the loss or its gradients are not finite."""
    step = train_step()
    batch, start = make_batch(step), fresh_state(step)
    state, _ = step.update(start, batch, schedule(step))
    if where == "backbone":
        name = "blocks.0.ffn.down_proj.kernel"
        params = {**state.params, name: state.params[name].at[0, 0].set(3e38)}
        state = dataclasses.replace(state, params=params)
    else:
        row = step.reads.specs["stem"].layout.row_numbers(np.asarray(batch.tokens)[0, 0, 0])
        rows = state.tables["stem"].rows.at[:, row].set(jnp.inf)
        table = dataclasses.replace(state.tables["stem"], rows=rows)
        state = dataclasses.replace(state, tables={"stem": table})
    state = jax.device_put(state, step.shardings)
    before = jax.device_get(state)
    for count in (1, 2):
        state, metrics = step.update(state, batch, schedule(step))
        assert not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]))
        assert (metrics["bad_steps"], metrics["skipped_steps"]) == (count, count)
        assert (state.step, state.updates, state.bad_steps) == (1 + count, 1, count)
    kept = ("params", "opt_state", "tables")
    for old, new in zip(
        jax.tree.leaves([getattr(before, name) for name in kept]),
        jax.tree.leaves([getattr(state, name) for name in kept]),
        strict=True,
    ):
        assert np.array_equal(old, new, equal_nan=True)
    # The next good batch goes on with the rate of the second update, and the count starts anew.
    healthy, _ = step.update(fresh_state(step), batch, schedule(step))
    bad = {"step": state.step, "bad_steps": state.bad_steps}
    state, metrics = step.update(dataclasses.replace(healthy, **bad), batch, schedule(step))
    assert (state.step, state.updates, state.bad_steps) == (4, 2, 0)
    assert metrics["skipped_steps"] == 2


def test_a_batch_without_scored_positions_is_harmless(train_step, fresh_state, make_batch):
    step = train_step()
    batch = make_batch(step)
    nothing = dataclasses.replace(batch, loss_mask=jnp.zeros_like(batch.loss_mask))
    state, metrics = step.update(fresh_state(step), nothing, schedule(step))
    assert (metrics["loss"], metrics["grad_norm"], metrics["table_grad_norm"]) == (0, 0, 0)
    assert all(np.all(np.isfinite(array)) for array in jax.tree.leaves(state))


def test_the_first_rate_of_a_warm_up_is_zero(tiny_config):
    config = tiny_config(**{"optimizer.warmup_steps": 4, "optimizer.schedule": "linear"})
    rates = learning_rates(config, 6)
    assert rates.dtype == np.float32
    np.testing.assert_allclose(rates[:5], np.array([0, 0.25, 0.5, 0.75, 1]) * 1e-3, rtol=1e-6)


@pytest.mark.parametrize(
    ("way", "micro_batches"),
    [
        ("windows", 1),
        pytest.param("windows", 2, marks=pytest.mark.long),
        pytest.param("segments", 1, marks=pytest.mark.long),
    ],
)
def test_sums_of_accelerators_train_alike(
    way, micro_batches, train_step, fresh_state, make_batch, runs, monkeypatch
):
    """Rows and the embedding; windows of 8 values."""
    monkeypatch.setitem(row_sums.WAYS, "cpu", way)
    monkeypatch.setattr(row_sums, "_CHUNK", 8)
    kept = train_step((2, 2, 2))
    train = dataclasses.replace(kept.config.train, micro_batches=micro_batches)
    step = TrainStep(dataclasses.replace(kept.config, train=train), kept.mesh)
    _, losses = _run(step, fresh_state(step), make_batch, 20)
    np.testing.assert_allclose(losses, runs[2, 2, 2][2], rtol=0, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        ("scatter", "bfloat16"),
        pytest.param("segments", "float32", marks=pytest.mark.nightly),
    ],
)
def test_gradients_of_rows_add_up_in_place_to_the_same_bits(
    way, dtype, tiny_config, device_mesh, fresh_state, make_batch, monkeypatch
):
    """Over micro-batches; on TPUs each is followed by a pass over all rows."""
    monkeypatch.setitem(row_sums.WAYS, "cpu", way)
    keys = {"model.num_layers": 4, "model.stem_layers": (1, 3), "model.scan_layers": True}
    keys |= {"model.compute_dtype": dtype, "model.remat": "full", "train.micro_batches": 4}
    ends, passes = [], []
    for in_place in (True, False):
        monkeypatch.setattr(step_module, "adds", lambda way, in_place=in_place: in_place)
        step = TrainStep(tiny_config(**keys), device_mesh((2, 1, 2)))
        batch, state = make_batch(step, ragged=True), fresh_state(step)
        compiled = step.update.lower(state, batch, schedule(step)).compile()
        passes.append("part.row_copies/add" in compiled.as_text())
        ends.append(jax.device_get(step.update(state, batch, schedule(step))))
    jax.tree.map(np.testing.assert_array_equal, *ends)
    assert passes == [False, True]


@pytest.mark.parametrize(
    ("way", "shape", "levels"),
    [
        ("scatter", (2, 2, 2), (0, 3)),
        pytest.param("scatter", (2, 2, 2), (2, 3), marks=pytest.mark.long),
        pytest.param(
            "scatter", (1, 1, 1), (0, 2, 3), marks=[pytest.mark.long, pytest.mark.nightly]
        ),
        pytest.param("windows", (2, 2, 2), (0, 2, 3), marks=pytest.mark.long),
    ],
)
def test_every_level_of_sizes_trains_to_the_same_bits(
    way, shape, levels, tiny_config, device_mesh, fresh_state, make_batch, monkeypatch
):
    """With norms clipped, which are sums over all room that there is."""
    monkeypatch.setitem(row_sums.WAYS, "cpu", way)
    # Two levels of the few rows here, and room for any batch.
    for constant in ("_SMALLEST_BLOCK", "_SMALLEST_PAIR"):
        monkeypatch.setattr(block_sizes, constant, 1)
    for constant in ("_SPREAD", "_SPREAD_OF_PAIRS"):
        monkeypatch.setattr(block_sizes, constant, 0)
    keys = {"optimizer.clip_norm": 0.1, "tables.clip_norm": 0.01}
    keys |= {"model.num_layers": 2, "model.stem_layers": (0, 1)}
    step = TrainStep(tiny_config(**keys), device_mesh(shape))
    batches = [make_batch(step, seed=seed, ragged=True) for seed in range(3)]
    table = step.reads.tables(batches[0])["stem"]
    needs = [table.needed_by(step.demand(batch)["stem"]) for batch in batches]
    most = needs[0].with_numbers(np.max([n.numbers for n in needs], axis=0).tolist())
    sizes_of = {level: sizes_at(level, most, table.largest_sizes) for level in levels}
    assert len(set(sizes_of.values())) == len(levels)
    ends = []
    for of_stem in sizes_of.values():
        state, sizes = fresh_state(step), ReadSizes((("stem", of_stem),))
        for batch in batches:
            state, metrics = step.update(state, batch, schedule(step), sizes=sizes)
        assert metrics["grad_norm"] > 0.1 and metrics["table_grad_norm"] > 0.01
        del metrics["table/exchange_bytes"]
        ends.append(jax.device_get((state, metrics)))
    for other in ends[1:]:
        jax.tree.map(np.testing.assert_array_equal, ends[0], other)


def _evaluation_program(step: TrainStep) -> str:
    train = step.config.train
    shape = (train.micro_batches, step.config.micro_batch_size, train.seq_len)
    ints = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=step.batch_sharding)
    mask = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=step.batch_sharding)
    state = abstract_state(step.blueprint)
    batch = Batch(ints, ints, ints, ints, mask)
    return step.evaluate.lower(state, batch, schedule(step)).as_text()


def test_the_program_of_a_validation_does_not_grow_with_its_micro_batches(train_step):
    one, many = (
        _evaluation_program(
            train_step(**{"train.micro_batches": parts, "train.global_batch_size": 16})
        )
        for parts in (1, 16)
    )
    assert many.count("dot_general") == one.count("dot_general")
    assert len(many) == pytest.approx(len(one), rel=0.1)


def test_a_step_needs_no_transfer_but_its_batch(train_step, fresh_state, make_batch):
    step = train_step((2, 2, 2))
    placed = make_schedule(step.config, 32, RATES, mesh=step.mesh)
    state, _ = step.update(fresh_state(step), make_batch(step), placed)
    batch = make_batch(step, seed=1)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(step.update(state, batch, placed))
    with pytest.raises(RuntimeError, match="Disallowed"), jax.transfer_guard("disallow"):
        step.update(state, batch, schedule(step))


def test_the_loop_places_its_schedule_once(train_step, monkeypatch, tmp_path):
    """Some 4 MB of a long run went to every device with every step."""

    class Seen(Exception):
        pass

    step = train_step((2, 2, 2))

    def make(*args, **kwargs):
        raise Seen(make_schedule(*args, **kwargs))

    monkeypatch.setattr(loop, "make_schedule", make)
    run = loop.Loop(step.config, step, None, tmp_path, {}, None, None, lambda: False)
    state = dataclasses.replace(step.shardings, step=0)
    with pytest.raises(Seen) as seen:
        run.run(state)
    (found,) = seen.value.args
    for array in jax.tree.leaves(found):
        assert array.sharding.is_equivalent_to(replicated(step.mesh), array.ndim)
