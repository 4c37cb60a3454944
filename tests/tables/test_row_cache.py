"""Which rows stay in the slots: exact bookkeeping, and the history that a policy keeps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stem_jax.tables.row_cache import POLICIES, CacheTooSmall, RowCache

ROWS = 12
NONE = frozenset()


def assign(cache: RowCache, rows, pinned=(), record: bool = True):
    return cache.assign(np.array(sorted(rows), np.int64), np.array(list(pinned), np.int64), record)


def test_rows_take_the_slots_of_those_that_leave():
    cache = RowCache(np.array([4, 0, 7]), ROWS)
    assign(cache, [7])
    found = assign(cache, [2, 4])
    # Row 7 was asked for and row 0 never.
    assert found.slots.tolist() == [1, 0]
    moved = (found.missing.tolist(), found.places.tolist(), found.evicted.tolist())
    assert moved == ([2], [1], [0])
    assert cache.rows.tolist() == [4, 2, 7]
    dtypes = [value.dtype for value in (found.slots, found.missing, found.places, found.evicted)]
    assert dtypes == [np.int32, np.int64, np.int32, np.int64]


def test_nothing_is_asked():
    cache = RowCache(np.array([4, 0, 7]), ROWS)
    found = cache.assign(np.empty(0, np.int64))
    assert [len(found.slots), len(found.missing), len(found.places), len(found.evicted)] == [0] * 4
    assert cache.rows.tolist() == [4, 0, 7]


def test_the_callers_arrays_are_its_own():
    resident = np.array([4, 0, 7])
    cache = RowCache(resident, ROWS)
    found = assign(cache, [2])
    evicted = found.evicted.copy()
    assign(cache, [1, 3, 5])
    assert resident.tolist() == [4, 0, 7]
    assert found.evicted.tolist() == evicted.tolist()
    with pytest.raises(ValueError, match="read-only"):
        cache.rows[0] = 1


def test_equal_scores_leave_by_row_whatever_their_slot():
    for resident in ([1, 3, 5, 7], [7, 1, 5, 3]):
        cache = RowCache(np.array(resident), ROWS)
        assert assign(cache, [0, 2]).evicted.tolist() == [1, 3]


def test_unknown_policy():
    with pytest.raises(ValueError, match="'fifo' is unknown: use one of lfu, lru"):
        RowCache(np.arange(2), ROWS, "fifo")


row_sets = st.frozensets(st.integers(0, ROWS - 1), max_size=5)
batches = st.lists(st.tuples(row_sets, row_sets, st.booleans()), max_size=25)


@given(
    order=st.permutations(range(ROWS)),
    num_slots=st.integers(1, ROWS),
    batches=batches,
    policy=st.sampled_from(POLICIES),
)
def test_against_a_dictionary(order, num_slots, batches, policy):
    cache = RowCache(np.array(order[:num_slots]), ROWS, policy)
    model = {row: slot for slot, row in enumerate(order[:num_slots])}  # row to slot
    for rows, pinned, record in batches:
        kept = {row: slot for row, slot in model.items() if row in rows | pinned}
        if len(rows | set(kept)) > num_slots:
            with pytest.raises(CacheTooSmall) as caught:
                assign(cache, rows, pinned, record)
            assert caught.value.needed == len(rows | pinned)
        else:
            found = assign(cache, rows, pinned, record)
            assert found.missing.tolist() == sorted(rows - set(model))
            assert found.evicted.tolist() == sorted(found.evicted)
            for row, slot, old in zip(found.missing, found.places, found.evicted, strict=True):
                assert model.pop(old) == slot
                model[row] = slot
            assert found.slots.tolist() == [model[row] for row in sorted(rows)]
            assert kept.items() <= model.items()
        assert dict(zip(cache.rows.tolist(), range(num_slots), strict=True)) == model


@given(
    order=st.permutations(range(ROWS)),
    num_slots=st.integers(1, 6),
    history=batches,
    rows=row_sets,
    num_pinned=st.integers(0, 5),
    policy=st.sampled_from(POLICIES),
)
def test_refused_batches_change_nothing(order, num_slots, history, rows, num_pinned, policy):
    """`needed` slots are enough, one less is not; and what follows is as if nothing was asked."""
    cache, other = (RowCache(np.array(order[:num_slots]), ROWS, policy) for _ in range(2))
    pinned = frozenset(order[: min(num_pinned, num_slots)])
    try:
        assign(cache, rows, pinned)
    except CacheTooSmall as error:
        assert num_slots < error.needed <= ROWS
        # The pinned rows stay resident in both, as they are the first of `order`.
        assign(RowCache(np.array(order[: error.needed]), ROWS, policy), rows, pinned)
        with pytest.raises(CacheTooSmall):
            assign(RowCache(np.array(order[: error.needed - 1]), ROWS, policy), rows, pinned)
    else:
        return  # nothing was refused
    for rows, _, record in history:
        if len(rows) <= num_slots:
            assign(cache, rows, NONE, record)
            assign(other, rows, NONE, record)
        assert cache.rows.tolist() == other.rows.tolist()


@given(num_slots=st.integers(5, ROWS), batches=batches, half_life=st.sampled_from([0.5, 3, 40]))
def test_lfu_keeps_the_largest_decayed_counts(num_slots, batches, half_life):
    cache = RowCache(np.arange(num_slots), ROWS, "lfu", half_life)
    counts = np.zeros(ROWS)
    for rows, _, record in batches:
        before = set(cache.rows.tolist())
        evicted = assign(cache, rows, NONE, record).evicted
        stayed = list(before - set(evicted.tolist()) - rows)
        assert counts[evicted].max(initial=0) <= counts[stayed].min(initial=np.inf) + 1e-9
        if record:
            counts *= 0.5 ** (1 / half_life)
            counts[list(rows)] += 1


@given(num_slots=st.integers(5, ROWS), batches=batches)
def test_lru_evicts_what_was_not_asked_for_longest(num_slots, batches):
    cache = RowCache(np.arange(num_slots), ROWS, "lru")
    last = np.zeros(ROWS)
    for number, (rows, _, record) in enumerate(batches, start=1):
        before = set(cache.rows.tolist())
        evicted = assign(cache, rows, NONE, record).evicted
        stayed = list(before - set(evicted.tolist()) - rows)
        assert last[evicted].max(initial=0) <= last[stayed].min(initial=np.inf)
        if record:
            last[list(rows)] = number


@given(
    order=st.permutations(range(ROWS)),
    num_slots=st.integers(1, ROWS),
    batches=batches,
    policy=st.sampled_from(POLICIES),
)
def test_a_table_of_a_thousand_million_rows_is_treated_alike(order, num_slots, batches, policy):
    """The books of a small table know all rows, those of a large one find them by hashing."""
    apart = 10**8
    small = RowCache(np.array(order[:num_slots]), ROWS, policy)
    large = RowCache(apart * np.array(order[:num_slots]), apart * ROWS, policy)
    for rows, pinned, record in batches:
        try:
            found = assign(small, rows, pinned, record)
        except CacheTooSmall:
            with pytest.raises(CacheTooSmall):
                assign(large, {apart * row for row in rows}, {apart * r for r in pinned}, record)
            continue
        other = assign(large, {apart * row for row in rows}, {apart * r for r in pinned}, record)
        assert other.slots.tolist() == found.slots.tolist()
        assert other.places.tolist() == found.places.tolist()
        assert other.missing.tolist() == (apart * found.missing).tolist()
        assert other.evicted.tolist() == (apart * found.evicted).tolist()


@pytest.mark.parametrize("policy", POLICIES)
def test_full_books_forget_rows_on_the_host_that_are_worth_least(policy):
    """Rows pass by until the books were full several times; which row lies where stays true."""
    num_rows, hot = 10**9, np.arange(5)
    cache = RowCache(np.arange(10), num_rows, policy)
    books = cache._slots.nbytes + cache._scores.nbytes
    for _ in range(50):
        assign(cache, hot)
    passing = np.arange(10, 10 + 10 * 4_000).reshape(-1, 10) * 7919
    for number, rows in enumerate(passing):
        slots = assign(cache, rows).slots
        assert (cache.rows[slots] == rows).all()
        if policy == "lfu":
            # All of them had to leave, but what they are worth is known.
            assert (cache._index.find(hot) != cache._index.absent).all()
            if number % 20 == 0:
                assign(cache, hot)
    assert sorted(cache._slots[cache._slots >= 0]) == list(range(10))
    assert cache._slots.nbytes + cache._scores.nbytes == books
    slots = cache._slots[cache._index.find(np.array(cache.rows))]
    assert slots.tolist() == list(range(10))


@pytest.mark.parametrize(("policy", "missed"), [("lfu", 0), ("lru", 184)])
def test_a_scan_costs_hot_rows_under_lru_alone(policy, missed):
    """Two of eight hot rows per batch in turn, beside five rows that are never asked for again.

    Between two requests for a hot row pass 27 others, more than there are slots.
    """
    cache = RowCache(np.arange(16), 1000, policy)
    found = 0
    for number in range(100):
        hot = [number % 4, number % 4 + 4]
        missing = assign(cache, [*hot, *range(100 + 5 * number, 105 + 5 * number)]).missing
        # In the first eight batches the hot rows are no hotter than others.
        found += np.isin(hot, missing).sum() if number >= 8 else 0
    assert found == missed


def test_rows_on_the_host_keep_their_history():
    cache = RowCache(np.array([0, 1]), ROWS)
    for rows in ([0], [0], [0], [5, 6], [0], [6], [6]):
        assign(cache, rows)
    # Row 0 was asked for four times, once since it came back; row 6 three times.
    assert assign(cache, [7]).evicted.tolist() == [6]


@pytest.mark.parametrize("half_life", [2, 8, 32])
def test_a_formerly_hot_row_goes(half_life):
    def batches_until_it_goes(half_life: float, limit: int) -> int:
        cache = RowCache(np.array([0, 1]), ROWS, "lfu", half_life)
        for _ in range(500):
            assign(cache, [0])
        for number in range(limit):
            if 0 in assign(cache, [2 + number % 3]).evicted:
                return number
        return limit

    limit = 3 * half_life
    assert half_life / 2 < batches_until_it_goes(half_life, limit) < limit
    assert batches_until_it_goes(np.inf, limit) == limit


def test_scores_stay_in_range():
    """What a request is worth would leave float64 after 1024 half lives.

    At a quarter of a batch, a request outweighs all earlier ones together: lfu is lru.
    """
    rng = np.random.default_rng(0)
    lfu, lru = RowCache(np.arange(6), ROWS, "lfu", 0.25), RowCache(np.arange(6), ROWS, "lru")
    for row in rng.integers(0, ROWS, 2000):
        assert assign(lfu, [row]).evicted.tolist() == assign(lru, [row]).evicted.tolist()


@pytest.mark.parametrize("policy", POLICIES)
def test_evaluation_leaves_no_trace_in_the_policy(policy):
    cache = RowCache(np.arange(4), ROWS, policy)
    for rows in ([0, 1, 2, 3], [2, 3], [2]):
        assign(cache, rows)
    for _ in range(50):
        assign(cache, [0, 1], record=False)
    assert assign(cache, [8, 9]).evicted.tolist() == [0, 1]
