"""Stores that keep the rows alone that were written."""

import dataclasses
import mmap

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_jax.memory.catalogue import table_specs
from stem_jax.tables.first_rows import FirstRows
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.kept_rows import KeptRows, reserved
from stem_jax.tables.layout import TableLayout
from stem_jax.tables.spec import init_table, logical
from stem_jax.tables.store_snapshot import NUMBERS

ROWS = 480


@pytest.fixture
def hashed_spec(tiny_config):
    spec = table_specs(tiny_config())["stem"]
    return dataclasses.replace(spec, layout=TableLayout(ROWS, 16, spread=True))


@settings(max_examples=30, deadline=None)
@given(st.data(), st.sampled_from([200, 100_000, 2**31 - 1]))
def test_rows_get_the_next_places_and_stay_there(data, num_rows):
    # What is reserved of 2^31 rows takes no memory.
    kept, model = KeptRows(num_rows), {}
    for size in data.draw(st.lists(st.integers(1, 9000), max_size=6)):
        seed = data.draw(st.integers(0, 2**32 - 1))
        rows = np.unique(np.random.default_rng(seed).integers(0, num_rows, size))
        known = np.array([model.get(row, -1) for row in rows.tolist()])
        np.testing.assert_array_equal(kept.find(rows), known)
        for row in rows.tolist():
            model.setdefault(row, len(model))
        np.testing.assert_array_equal(kept.places(rows), [model[row] for row in rows.tolist()])
    assert kept.count == len(model)
    np.testing.assert_array_equal(kept.numbers[: kept.count], list(model))


def test_a_system_without_large_pages_reserves_too(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345, raising=False)
    assert reserved((3,), "float32").tolist() == [0, 0, 0]


def test_reserved_memory_is_zero_and_of_any_type():
    array = reserved((3, 2, 5), "bfloat16")
    assert array.shape == (3, 2, 5) and not array.any()
    array[1] = 2
    assert float(array.astype(np.float32).sum()) == 20


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_rows_that_were_never_written_are_the_first_ones(hashed_spec, device_mesh, shape):
    mesh, key = device_mesh(shape), jax.random.key(3)
    store = HostStore.create(hashed_spec, key, mesh)
    assert store.num_bytes == 0
    table = jax.device_get(init_table(hashed_spec, key, mesh))
    for block in store.blocks:
        found = _gathered(store, block, np.array([9, 0, 17]))
        rows = np.array([9, 0, 17]) + block.row_range.start
        columns = slice(block.column_range.start, block.column_range.stop)
        np.testing.assert_array_equal(found["rows"], logical(table.rows)[rows][:, :, columns])
        assert not any(found[name].any() for name in ("mu", "nu", "last_step"))
        # Asking keeps nothing.
        assert block.count == 0


def test_what_was_written_comes_back(hashed_spec, device_mesh):
    store = HostStore.create(hashed_spec, jax.random.key(3), device_mesh((1, 1, 1)))
    [block] = store.blocks
    rows = np.array([400, 7, 30])
    _write(store, block, rows, 5)
    asked = np.array([7, 8, 400])
    found = _gathered(store, block, asked)
    assert (found["nu"][[0, 2]] == 5).all() and not found["nu"][1].any()
    assert (found["last_step"] == [5, 0, 5]).all()
    assert block.count == 3
    # Nothing but three rows with their numbers.
    assert store.num_bytes == 3 * (hashed_spec.row_bytes() + 4)


def test_rows_that_came_from_another_run_have_decayed(hashed_spec, device_mesh):
    mesh, first = device_mesh((1, 1, 1)), FirstRows.of(hashed_spec, jax.random.key(3))
    numbers = np.array([5, 6])
    half = first.scaled(0.5).made(hashed_spec, numbers)
    np.testing.assert_array_equal(half, first.made(hashed_spec, numbers) * np.float32(0.5))
    assert FirstRows.from_record(first.scaled(0.5).record()) == first.scaled(0.5)
    store = HostStore.empty(hashed_spec, mesh, first.scaled(0.5))
    np.testing.assert_array_equal(_gathered(store, store.blocks[0], numbers)["rows"], half)


def test_a_snapshot_does_not_see_what_comes_later(hashed_spec, device_mesh):
    store = HostStore.create(hashed_spec, jax.random.key(3), device_mesh((1, 1, 1)))
    [block] = store.blocks
    _write(store, block, np.array([40, 3]), 1)
    snapshot = store.snapshot()
    assert snapshot.count == 2
    _write(store, block, np.array([3, 77, 5]), 2)
    numbers = np.concatenate([part for _, part in snapshot.pieces(0, NUMBERS)])
    np.testing.assert_array_equal(numbers, [40, 3])
    again = np.concatenate([part for _, part in snapshot.pieces(0, NUMBERS)])
    np.testing.assert_array_equal(again, numbers)
    for name in store.fields:
        old = np.concatenate([part for _, part in snapshot.pieces(0, name)])
        assert len(old) == 2 and (old == 1).all(), name
        snapshot.finish(name)
    assert snapshot.closed
    assert (_gathered(store, block, np.array([3, 77, 5, 40]))["last_step"] == [2, 2, 2, 1]).all()


def _write(store, block, rows, value):
    shapes = {name: (len(rows), *array.shape[1:]) for name, array in block.arrays.items()}
    store.write(
        block, rows, {n: np.full(s, value, block.arrays[n].dtype) for n, s in shapes.items()}
    )


def _gathered(store, block, rows):
    out = {n: np.full((len(rows), *a.shape[1:]), 7, a.dtype) for n, a in block.arrays.items()}
    store.gather(block, rows, out)
    return out


def test_needed_memory_follows_the_rows_that_can_come(hashed_spec, device_mesh):
    mesh = device_mesh((1, 1, 1))
    whole = HostStore.needed_bytes(hashed_spec, mesh)
    assert whole == ROWS * hashed_spec.row_bytes()
    few = HostStore.needed_bytes(hashed_spec, mesh, rows=ROWS // 10)
    assert whole // 10 < few < whole // 5
