"""Places of rows in books that do not know all rows: found again, distinct, little memory."""

import tracemalloc

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from stem_jax.tables.row_index import RowIndex

MANY = 2**31 - 1

row_sets = st.lists(st.frozensets(st.integers(0, MANY - 1), max_size=40), max_size=8)


@hypothesis.given(row_sets, st.booleans(), st.booleans())
def test_against_a_dictionary(asked, apart, looked):
    """Rows of one begin of a walk too: those of equal hashes pass each other's places."""
    index, model = RowIndex(MANY, 1), {}
    if not apart:
        index._shift = np.uint64(63)
    for rows in asked:
        rows = np.array(sorted(rows), np.int64)
        found, ends = index.look(rows)
        assert found.tolist() == [model.get(row, index.absent) for row in rows.tolist()]
        there = found != index.absent
        np.testing.assert_array_equal(ends[there], found[there])
        new = rows[~there]
        places = index.add(new, ends[~there] if looked else None)
        assert all(0 <= place < index.size for place in places.tolist())
        model |= dict(zip(new.tolist(), places.tolist(), strict=True))
        assert len(set(model.values())) == len(model)
        np.testing.assert_array_equal(index.find(new), places)
    rows, places = index.known()
    assert dict(zip(rows.tolist(), places.tolist(), strict=True)) == model
    index.clear()
    assert set(index.find(rows).tolist()) <= {index.absent}


@pytest.mark.parametrize("first", [0, MANY - 10**5])
@pytest.mark.parametrize("stride", [1, 4096, 21474])
def test_full_to_the_brim(first, stride):
    index = RowIndex(MANY, 4096)
    rows = (first + stride * np.arange(index.most)) % MANY
    places = index.add(rows)
    assert len(np.unique(places)) == index.most
    np.testing.assert_array_equal(index.find(rows), places)
    assert not index.has_room(1)
    with pytest.raises(RuntimeError, match="1 rows more than"):
        index.add(np.array([first + 1 if stride > 1 else first - 1]) % MANY)
    np.testing.assert_array_equal(index.find(rows), places)


def test_rows_of_a_table_that_is_not_much_larger_lie_at_their_own_numbers():
    index = RowIndex(16 * 5000, 5000)
    rows = np.array([0, 3, 79_999])
    assert not index.hashed and index.has_room(10**9)
    np.testing.assert_array_equal(index.find(rows), rows)
    np.testing.assert_array_equal(index.add(rows), rows)
    assert RowIndex(16 * 5000 + 1, 5000).hashed


def test_memory_depends_on_the_rows_that_the_books_hold():
    sizes = []
    for num_rows in (10**6, MANY):
        tracemalloc.start()
        index = RowIndex(num_rows, 5000)
        sizes.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert index.most >= 4 * 5000
    assert sizes[1] < 1.01 * sizes[0] < 2**20
