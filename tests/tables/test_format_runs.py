"""Runs with rows in bfloat16 or one moment for each vector: wherever rows lie, and over again."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.loading import load_run
from stem_jax.checkpoints.origin import begin_from, find_origin
from stem_jax.checkpoints.saved_model import open_saved_model
from stem_jax.errors import InputError
from stem_jax.mesh import make_mesh
from stem_jax.tables.spec import logical
from stem_jax.training.resume import check_resumable
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import abstract_state
from stem_jax.training.step import TrainStep
from tests.logical import logical_table
from tests.offloading import SIZES, run, store_arrays, variant
from tests.saved_models import SIZES as SAVED_SIZES
from tests.saved_models import save_run, trained_state

ROWWISE = {"tables.moments": "rowwise"}
BFLOAT16 = {"tables.row_format": "bfloat16"}
FORMATS = {"rowwise": ROWWISE, "bfloat16": BFLOAT16, "bfloat16 rowwise": BFLOAT16 | ROWWISE}
FIELDS = {
    "rowwise": {"rows": "float32", "v": "float32", "last_step": "int32"},
    "bfloat16": {"rows": "bfloat16", "mu": "bfloat16", "nu": "bfloat16", "last_step": "int32"},
    "bfloat16 rowwise": {"rows": "bfloat16", "v": "float32", "last_step": "int32"},
}
ONE, EIGHT, ALL = (1, 1, 1), (8, 1, 1), (2, 2, 2)
TENTH, HALF, STEPS, SAVED_AT = 208, 1024, 24, 12
SHORT = SIZES | {"train.steps": STEPS, "eval.every": 12, "checkpoint.every": SAVED_AT}
PLACES = [
    pytest.param(*place, id=f"{place[0]} {place[1]}".replace("tables.", ""), marks=marks)
    for place, marks in [
        (("bfloat16 rowwise", ONE), ()),
        (("bfloat16", ALL), pytest.mark.long),
        (("rowwise", ONE), pytest.mark.long),
        (("rowwise", ALL), [pytest.mark.long, pytest.mark.nightly]),
        (("bfloat16", ONE), [pytest.mark.long, pytest.mark.nightly]),
        (("bfloat16 rowwise", ALL), pytest.mark.long),
        (("bfloat16 rowwise", EIGHT), pytest.mark.long),
    ]
]


@pytest.fixture(scope="module")
def outcome(train_step, tmp_path_factory):
    """outcome(format, mesh, resident rows, prefetch): a whole run, its step and checkpoints."""

    @functools.cache
    def make(name, shape, rows=None, prefetch=2):
        resident = {} if rows is None else {"tables.resident_rows": rows}
        step = train_step(shape, **SHORT, **FORMATS[name], **resident)
        folder = tmp_path_factory.mktemp("run")
        return run(variant(step, prefetch=prefetch), folder, checkpoints=folder), folder, step

    return make


@pytest.mark.parametrize(("name", "shape"), PLACES)
def test_rows_in_host_memory_change_no_bit(outcome, name, shape):
    expected, _, step = outcome(name, shape)
    found, *_ = outcome(name, shape, HALF if shape == EIGHT else TENTH, 2)
    assert {n: str(a.dtype) for n, a in expected.table.items()} == FIELDS[name]
    assert {n: str(a.dtype) for n, a in found.table.items()} == FIELDS[name]
    found.assert_equals(expected)
    losses = expected.values("train/loss")
    assert len(losses) == STEPS and losses[STEPS] < losses[1] - 0.4
    assert found.total("table/evictions") > 50
    assert step.reads.specs["stem"].row_format in ("bfloat16", FIELDS[name]["rows"])


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_prefetch_changes_no_bit(outcome, name):
    (expected, *_), (found, *_) = outcome(name, ONE), outcome(name, ONE, TENTH, 0)
    found.assert_equals(expected)


@pytest.mark.parametrize(("name", "shape"), PLACES)
def test_a_run_continues_bit_for_bit(outcome, train_step, tmp_path, name, shape):
    """From a checkpoint of resident rows, with most of them in host memory, and the reverse."""
    expected, folder, _ = outcome(name, shape)
    rows = HALF if shape == EIGHT else TENTH
    *_, offloaded = outcome(name, shape, rows, 2)
    found = run(offloaded, tmp_path, resume=(folder, SAVED_AT))
    found.assert_equals(expected, after=SAVED_AT)


@pytest.mark.parametrize("name", FORMATS)
def test_checkpoints_are_the_same_on_every_mesh(train_step, tmp_path, name):
    """Saved on (2, 2, 2), read on (1) and (8) and back: every field, whatever lies in it."""
    steps = {shape: train_step(shape, **FORMATS[name]) for shape in (ALL, ONE, EIGHT)}
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        # Whole numbers, for every field has its own dtype.
        lambda a: jax.device_put(rng.integers(0, 100, a.shape).astype(a.dtype), a.sharding),
        abstract_state(steps[ALL].blueprint),
    )
    expected = logical_table(state.tables["stem"])
    assert {n: str(a.dtype) for n, a in expected.items()} == FIELDS[name]
    for number, (now, then) in enumerate([(ALL, ONE), (ONE, EIGHT), (EIGHT, ALL)]):
        info = CheckpointInfo(number, 1, 0, {}, "none", {}, steps[now].config)
        with Checkpointer(tmp_path) as checkpoints:
            checkpoints.save(state, info, None)
            checkpoints.wait()
            target = abstract_state(steps[then].blueprint)
            state = checkpoints.restore(number, target)
        for field, array in vars(state.tables["stem"]).items():
            wanted = getattr(target.tables["stem"], field)
            assert (array.sharding, array.dtype) == (wanted.sharding, wanted.dtype)
            np.testing.assert_array_equal(logical(np.asarray(array)), expected[field])


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_readers_see_what_the_next_step_would(train_step, make_batch, tmp_path, compute):
    """Rows that lag behind, resident, offloaded and read for an export, which has float32."""
    keys = SAVED_SIZES | FORMATS["bfloat16 rowwise"] | {"model.compute_dtype": compute}
    step = train_step(**keys)
    state = trained_state(step, make_batch)
    save_run(tmp_path, step, state)
    schedule = make_schedule(step.config, int(state.updates) + 1)
    expected = np.asarray(logical(step.caught_up_rows(state, schedule)["stem"]))
    assert expected.dtype == np.float32
    stale = np.asarray(logical(state.tables["stem"].rows)).astype(np.float32)
    assert np.any(expected != stale)
    spec = step.reads.specs["stem"]
    for ids, columns, rows in open_saved_model(tmp_path).table_pieces():
        assert rows.dtype == np.float32
        found = expected[spec.layout.row_numbers(ids)][..., columns]
        np.testing.assert_allclose(rows, found, rtol=0, atol=1e-8)
    ids = np.arange(24, dtype=np.int32)[None]
    rounded = expected[spec.layout.row_numbers(ids[0])].astype(compute)
    for resident in (None, 64):
        loaded = load_run(tmp_path, resident_rows=resident)
        block, inverse = loaded.rows["stem"].serve(ids).block(ids, compute)
        found = np.asarray(block)[:, np.asarray(inverse)[0]].swapaxes(0, 1)
        np.testing.assert_allclose(np.float32(found), np.float32(rounded), rtol=0, atol=1e-8)
        loaded.close()


@pytest.mark.parametrize("resident", [None, 64])
@pytest.mark.parametrize(
    ("there", "here"),
    [({}, FORMATS["bfloat16"]), (FORMATS["bfloat16 rowwise"], {})],
    ids=["to bfloat16", "from bfloat16"],
)
def test_another_format_begins_with_the_rows(
    train_step, make_batch, tmp_path, there, here, resident
):
    """`train.init_from` converts: to the nearest number of bfloat16, from it without any loss."""
    step = train_step(**SAVED_SIZES, **there)
    state = trained_state(step, make_batch)
    save_run(tmp_path, step, state)
    schedule = make_schedule(step.config, int(state.updates) + 1)
    expected = np.asarray(logical(step.caught_up_rows(state, schedule)["stem"]))
    other = train_step(**SAVED_SIZES, **here).config
    config = dataclasses.replace(
        other,
        tables=dataclasses.replace(other.tables, resident_rows=resident),
        train=dataclasses.replace(other.train, init_from=str(tmp_path)),
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state, stores = begin_from(find_origin(config), TrainStep(config, mesh))
    table = store_arrays(stores["stem"]) if resident else logical_table(state.tables["stem"])
    row_format = config.tables.row_format
    assert {n: str(a.dtype) for n, a in table.items()} == {
        "rows": row_format, "mu": row_format, "nu": row_format, "last_step": "int32"
    }  # fmt: skip
    np.testing.assert_allclose(
        np.float32(table["rows"]),
        np.float32(expected.astype(row_format)),
        rtol=0,
        atol=1e-8,
    )
    assert not any(np.any(np.float32(table[name])) for name in ("mu", "nu", "last_step"))


@pytest.mark.parametrize(
    ("key", "value"), [("tables.row_format", "bfloat16"), ("tables.moments", "rowwise")]
)
def test_a_run_keeps_its_format(tiny_config, key, value):
    one, other = tiny_config(), tiny_config(**{key: value})
    for saved, current in ((one, other), (other, one)):
        with pytest.raises(InputError, match=rf"{key.replace('.', '[.]')}: '\w+' -> '\w+'"):
            check_resumable(saved, current, 3)


@pytest.mark.parametrize(("key", "value"), [("row_format", "bfloat16"), ("moments", "rowwise")])
def test_so_does_each_memory(tiny_config, key, value):
    sizes = {"ngram.layers": "1", "ngram.keys_per_head": 88, "ngram.width": 32}
    one, other = tiny_config(**sizes), tiny_config(**sizes, **{f"ngram.{key}": value})
    said = rf"ngram[.]{key}: None -> '{value}'\); to continue the run add --config.ngram.{key}=none"
    with pytest.raises(InputError, match=said):
        check_resumable(one, other, 3)
