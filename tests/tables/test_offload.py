"""Rows in host memory change where a run computes, and not one bit of what it computes."""

import functools
import gc

import jax
import numpy as np
import pytest

from stem_jax.mesh import axis_size
from stem_jax.tables.spec import TableSpec, logical
from tests.offloading import SIZES, STEPS, rows_of_a_batch, run, variant

LAYOUTS = {
    "one device": ((1, 1, 1), {}),
    "eight shards": ((8, 1, 1), {}),
    # Columns in two halves, two copies of each shard, gradients of two micro-batches.
    "columns and copies": (
        (2, 2, 2),
        {"tables.vocab_axes": ("fsdp",), "train.micro_batches": 2},
    ),
}
TENTH, HALF = 208, 1024
# Layout, resident rows, prefetch, policy. A program is compiled for each number of rows.
RUNS = [
    ("one device", HALF, 4, "lfu"),
    ("one device", TENTH, 2, "lru"),
    ("one device", TENTH, 0, "lfu"),
    ("eight shards", "smallest", 1, "lfu"),
    ("columns and copies", TENTH, 2, "lfu"),
]
SAVED_AT = 30


@pytest.fixture(scope="module")
def programs(train_step):
    """programs(layout, resident rows, prefetch, policy): a train step, compiled once for each R."""

    def make(layout, rows=None, prefetch=2, policy="lfu"):
        shape, overrides = LAYOUTS[layout]
        if rows == "smallest":
            rows = smallest(layout, prefetch)
        resident = {} if rows is None else {"tables.resident_rows": rows}
        step = train_step(shape, **SIZES, **overrides, **resident)
        return variant(step, prefetch=prefetch, cache_policy=policy)

    def smallest(layout, prefetch):
        step = make(layout, prefetch=prefetch)
        return rows_of_a_batch(step)

    return make


@pytest.fixture(scope="module")
def outcome(programs, tmp_path_factory):
    """outcome(layout, resident rows, prefetch, policy): a whole run and where its checkpoints are.

    It validates after steps 20, 40 and 60 and saves after steps 30 and 60.
    """

    @functools.cache
    def make(layout, *how):
        folder = tmp_path_factory.mktemp("run")
        return run(programs(layout, *how), folder, checkpoints=folder), folder

    return make


@pytest.mark.parametrize(
    "how",
    [
        *RUNS[1:3],
        # A program of its own, and two of eight devices.
        pytest.param(RUNS[0], marks=[pytest.mark.long, pytest.mark.nightly]),
        pytest.param(RUNS[3], marks=[pytest.mark.long, pytest.mark.nightly]),
        pytest.param(RUNS[4], marks=pytest.mark.long),
    ],
    ids=lambda how: "-".join(map(str, how)),
)
def test_a_run_is_that_with_all_rows_resident(outcome, how):
    layout, *_ = how
    (expected, _), (found, _) = outcome(layout), outcome(*how)
    found.assert_equals(expected)
    # Something was at stake: the model learnt, and rows went to and fro all the time.
    losses = expected.values("train/loss")
    assert len(losses) == STEPS and losses[STEPS] < losses[1] - 1
    # A row leaves for each that comes; the first tenth of the ids has most of Zipf's tokens.
    assert found.total("table/evictions") > (100 if how[1] == HALF else 500)
    assert np.count_nonzero(expected.table["last_step"]) > 300


@pytest.mark.parametrize(
    ("layout", "first", "second"),
    [
        pytest.param("one device", (TENTH, 2, "lru"), (HALF, 1, "lfu"), marks=pytest.mark.long),
        ("one device", (TENTH, 2, "lru"), ()),
        ("one device", (), (TENTH, 4, "lfu")),
        pytest.param("eight shards", ("smallest", 1, "lfu"), (), marks=pytest.mark.long),
        pytest.param("columns and copies", (), (TENTH, 2, "lfu"), marks=pytest.mark.long),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)) or "resident",
)
def test_a_run_continues_with_other_resident_rows(
    outcome, programs, tmp_path, layout, first, second
):
    expected, _ = outcome(layout)
    _, folder = outcome(layout, *first)
    found = run(programs(layout, *second), tmp_path, resume=(folder, SAVED_AT))
    found.assert_equals(expected, after=SAVED_AT)


@pytest.mark.parametrize(
    "layout",
    ["one device", *(pytest.param(name, marks=pytest.mark.long) for name in list(LAYOUTS)[1:])],
)
def test_devices_hold_the_resident_rows_alone(programs, tmp_path, layout):
    """Live arrays at a save: the slots once, and little that is on its way."""
    # At half of the rows, those of one batch on the way are next to nothing.
    runs = [("one device", HALF, 1), *RUNS[1:]]
    how = next(how for how in runs if how[0] == layout)
    step = programs(*how)
    rows, prefetch = step.reads.specs["stem"].num_slots, step.config.tables.prefetch
    owners = axis_size(step.mesh, step.reads.specs["stem"].vocab_axes)
    S, F = step.reads.specs["stem"].vectors, step.reads.specs["stem"].width
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    seen = []

    def watch(state, moving):
        table = vars(state.tables["stem"])
        mine = {id(array) for array in table.values()}
        live = [a for a in jax.live_arrays() if id(a) not in before and a.ndim == 3]
        # Logical, as rows travel.
        others = [a for a in live if id(a) not in mine and a.shape[1:] == (S, F)]
        assert {len(logical(a)) for a in table.values()} == {rows}
        # In flight: rows of up to `prefetch` batches; those that leave have left for a save.
        assert sum(len(a) for a in others) <= 3 * prefetch * max(64, 24 * owners)
        assert max((len(a) for a in others), default=0) < rows
        held = sum(_device_bytes(a) for a in table.values())
        seen.append((held, held + sum(_device_bytes(a) for a in others)))

    run(step, tmp_path, watch=watch)
    resident = sum(map(_placed_bytes, TableSpec.placed(step.reads.specs["stem"]), [step.mesh] * 4))
    assert len(seen) == 2
    for held, with_moving in seen:
        assert held == resident
        if rows == HALF:
            assert with_moving <= 1.05 * held


def _device_bytes(array: jax.Array) -> int:
    """Over all devices, copies counted each."""
    return sum(shard.data.nbytes for shard in array.addressable_shards)


def _placed_bytes(placed, mesh) -> int:
    shards = [axis_size(mesh, axes or ()) for axes in placed.spec]
    return int(np.prod(placed.shape)) * placed.itemsize * mesh.size // int(np.prod(shards))
