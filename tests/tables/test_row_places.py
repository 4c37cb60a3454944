"""Numbers of rows against a dictionary: rows come and go, and leave no marks."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from stem_jax.tables.row_places import LOAD, RowPlaces

MANY = 2**31 - 1
row_sets = st.lists(
    st.tuples(st.booleans(), st.frozensets(st.integers(0, MANY), max_size=30)), max_size=12
)


@hypothesis.given(row_sets, st.booleans())
def test_against_a_dictionary(calls, together):
    """Rows of one begin of a walk too: those of equal hashes pass each other's cells."""
    places, model, number = RowPlaces(100), {}, 0
    if together:
        places._begin = lambda rows: np.full(len(rows), places.size - 3)
    for puts, rows in calls:
        if puts:
            rows = np.array(sorted(rows), np.int64)[: 100 - len(model)]
            numbers = number + np.arange(len(rows))
            places.put(rows, numbers)
            model |= dict(zip(rows.tolist(), numbers.tolist(), strict=True))
            number += len(rows)
        else:
            known = sorted(model)[:: 1 + len(rows) % 3]
            places.remove(np.array(known, np.int64))
            model = {row: model[row] for row in model if row not in known}
        asked = np.array(sorted({*model, *rows}), np.int64)
        assert places.find(asked).tolist() == [model.get(row, -1) for row in asked.tolist()]
        assert places.count == len(model) == np.count_nonzero(places._rows)
    pairs: list[tuple[int, int]] = []
    for rows, numbers in places.pieces():
        pairs += zip(rows.tolist(), numbers.tolist(), strict=True)
    assert dict(pairs) == model and len(pairs) == len(model)


def test_walks_stay_short_however_many_rows_come_and_go():
    places, rng = RowPlaces(3000), np.random.default_rng(0)
    rows = rng.choice(MANY, 3000, replace=False)
    places.put(rows, np.arange(3000))
    for _ in range(100):
        at = rng.permutation(3000)[:1000]
        places.remove(rows[at])
        rows[at] = rng.choice(MANY, 1000, replace=False)
        places.put(rows[at], at)
    np.testing.assert_array_equal(places.find(rows), np.arange(3000))
    # Of a full map, the longest run of taken cells is what a row that is not there may cost.
    free = np.flatnonzero(places._rows == 0)
    assert len(free) == places.size - 3000
    assert np.diff(free).max() < 200


def test_no_room():
    places = RowPlaces(5)
    rows = np.arange(5)
    places.put(rows, rows)
    places.put(rows, rows + 1)
    with pytest.raises(RuntimeError, match="2 rows more than the 5"):
        places.put(np.array([1, 7, 8]), np.array([1, 2, 3]))
    with pytest.raises(KeyError, match="row 7 has no number"):
        places.remove(np.array([1, 7]))
    assert places.find(np.arange(9)).tolist() == [1, 2, 3, 4, 5, -1, -1, -1, -1]


def test_bytes_of_a_row():
    places = RowPlaces(10**5)
    assert places._rows.nbytes + places._numbers.nbytes == pytest.approx(8 * 10**5 / LOAD, rel=1e-3)
