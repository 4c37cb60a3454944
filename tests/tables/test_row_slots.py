"""The books of owners: every asked row has a slot, whoever else keeps books beside them."""

import dataclasses
import re
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from stem_jax.errors import InputError
from stem_jax.memory.catalogue import table_specs
from stem_jax.tables.asked_rows import AskedRows
from stem_jax.tables.layout import TableLayout
from stem_jax.tables.row_slots import RowSlots, _room

ROWS = 64


@pytest.fixture(scope="session")
def table_spec(tiny_config):
    """table_spec(resident rows): a table of 64 rows, the last two of them padding."""
    spec = table_specs(tiny_config(**{"model.vocab_size": ROWS - 2, "tables.pad_multiple": 16}))[
        "stem"
    ]
    return lambda resident: dataclasses.replace(spec, resident_rows=resident)


def asked_of(rows, owners: int) -> AskedRows:
    """Each row asked for by one more token than the row before."""
    tokens = np.repeat(sorted(rows), np.arange(1, len(rows) + 1)).astype(int)
    return AskedRows.of_tokens(tokens, ROWS, owners)


def held(slots: RowSlots, owners: int) -> list[np.ndarray]:
    return [slots.held(owner) for owner in range(owners)]


def test_the_lowest_keys_are_resident_at_first(table_spec):
    spec = table_spec(16)
    slots = RowSlots(spec, 4, "lfu")
    for owner, rows in enumerate(held(slots, 4)):
        keys = spec.layout.key_numbers(owner * 16 + np.arange(16))
        assert sorted(keys[rows]) == sorted(keys)[:4]


@hypothesis.given(st.integers(1, 400), st.sampled_from([1, 2, 3, 8]), st.booleans(), st.data())
def test_the_lowest_keys_are_found_as_by_sorting_all(table_spec, tens, owners, spread, data):
    layout = TableLayout(10 * tens, owners, spread)
    per_owner = layout.num_rows // owners
    resident = owners * data.draw(st.integers(1, per_owner))
    spec = dataclasses.replace(table_spec(resident), layout=layout)
    slots = RowSlots(spec, owners, "lfu")
    keys_PxN = layout.key_numbers(np.arange(layout.num_rows)).reshape(owners, -1)
    for keys, rows in zip(keys_PxN, held(slots, owners), strict=True):
        np.testing.assert_array_equal(rows, np.argsort(keys)[: resident // owners])


def test_books_of_a_large_table_are_as_small_as_those_of_a_small_one(table_spec):
    """A table of 2^30 rows, hashed or not, in a moment and in a few MiB."""
    for spread in (False, True):
        layout = TableLayout(2**30, 8, spread)
        spec = dataclasses.replace(table_spec(2**13), layout=layout)
        tracemalloc.start()
        slots = RowSlots(spec, 8, "lfu")
        rows = np.arange(0, 2**30, 2**20)
        slots.assign(AskedRows.of_tokens(rows, 2**30, 8))
        assert tracemalloc.get_traced_memory()[1] < 2**24
        tracemalloc.stop()


def test_a_move_by_hand(table_spec):
    slots = RowSlots(table_spec(8), 2, "lfu")
    before = held(slots, 2)
    new = [next(r for r in range(32) if r not in before[owner]) for owner in range(2)]
    # Owner 0 is asked for a row it has and one it has not, owner 1 for one it has not.
    asked = [before[0][2], new[0], 32 + new[1]]
    move = slots.assign(asked_of(asked, 2))
    assert (move.asked, move.missing, move.tokens) == (3, 2, 6)
    absent = [r for r in asked if r != before[0][2]]
    # Each row has one token more than the one before.
    assert move.missing_tokens == sum(sorted(asked).index(r) + 1 for r in absent)
    after = held(slots, 2)
    for owner, rows in enumerate([sorted(asked[:2]), [new[1]]]):
        line, places = move.slots(owner, 5, 4), move.places(owner, 4)
        found = line[: len(rows)]
        assert (after[owner][found] == rows).all()
        # What pads the slots lies past the end, and so do the places, no two of them equal.
        assert (line[len(rows) :] == 4).all()
        assert places[0] == np.flatnonzero(before[owner] != after[owner])
        assert (places[1:] >= 4).all() and len(set(places)) == move.size


batches = st.lists(st.sets(st.integers(0, ROWS - 1), max_size=16), min_size=1, max_size=12)


@hypothesis.given(batches, st.sampled_from([1, 4]), st.sampled_from(["lfu", "lru"]), st.data())
def test_asked_and_pinned_rows_are_resident(table_spec, asked, owners, policy, data):
    """Against a plain model: which row is in which slot, and what each move says of it."""
    window = [set(), *asked]
    needed = max(asked_of(a | b, owners).slots_needed for a, b in zip(window, asked))
    resident = min(ROWS, needed + owners * data.draw(st.integers(0, 3)) or owners)
    slots = RowSlots(table_spec(resident), owners, policy)
    last = owners - 1
    twin = RowSlots(table_spec(resident), owners, policy, [[last]])
    per_owner, shard = resident // owners, ROWS // owners
    model = held(slots, owners)
    for before, rows in zip(window, asked):
        record = data.draw(st.booleans())
        move = slots.assign(asked_of(rows, owners), asked_of(before, owners), record=record)
        # A process that holds the last owner alone, and hears of it alone, finds the same for it.
        own = [one.of_owners([last]) for one in (asked_of(rows, owners), asked_of(before, owners))]
        other = twin.assign(*own, record=record).assignments
        assert list(other) == twin.owners == [last]
        for name, found in vars(move.assignments[last]).items():
            np.testing.assert_array_equal(vars(other[last])[name], found)
        missing = 0
        for owner, assignment in move.assignments.items():
            mine = sorted(r - owner * shard for r in rows if r // shard == owner)
            assert set(assignment.missing) == set(mine) - set(model[owner])
            assert (model[owner][assignment.places] == assignment.evicted).all()
            model[owner][assignment.places] = assignment.missing
            assert (model[owner][assignment.slots] == mine).all()
            stay = {r - owner * shard for r in before if r // shard == owner}
            assert stay <= set(model[owner])
            assert len(set(model[owner])) == per_owner
            assert len(assignment.missing) <= move.size
            missing += len(assignment.missing)
        assert (move.asked, move.missing) == (len(rows), missing)
        assert (move.size == 0) == (missing == 0)
        for line, rows_of_owner in zip(model, held(slots, owners), strict=True):
            np.testing.assert_array_equal(line, rows_of_owner)


@hypothesis.given(
    st.sets(st.integers(0, ROWS - 1), min_size=9, max_size=20),
    st.sets(st.integers(0, ROWS - 1), min_size=9, max_size=20),
    st.sampled_from([1, 4]),
)
def test_a_refusal_names_the_smallest_that_works(table_spec, before, rows, owners):
    resident = owners
    while True:
        slots = RowSlots(table_spec(resident), owners, "lfu")
        try:
            slots.assign(asked_of(before, owners))
            slots.assign(asked_of(rows, owners), asked_of(before, owners))
            break
        except InputError as error:
            found = re.search(r"resident_rows=(\d+) is less .* for them is (\d+)\.", str(error))
            assert int(found[1]) == resident and int(found[2]) > resident
            resident = int(found[2])
    for one in (before, before | rows):
        assert resident >= asked_of(one, owners).slots_needed
    assert resident == asked_of(before | rows, owners).slots_needed


def test_owners_of_the_same_processes_keep_rows_of_batches_in_flight_together(table_spec):
    """Of three slots each. The latest batches stay, as far as all of a group have room."""
    before = [asked_of({0, 1, 32}, 2), asked_of({2, 33}, 2)]
    asked = asked_of({3, 34, 35}, 2)
    stay = {}
    for groups in ([[0, 1]], [[0], [1]], [[1]]):
        slots = RowSlots(table_spec(6), 2, "lfu", groups)
        stay[str(groups)] = {
            owner: rows.tolist() for owner, rows in slots.staying(asked, before).rows.items()
        }
    assert stay["[[0, 1]]"] == {0: [2], 1: [1]}
    # Owner 0 has no room for the first batch, owner 1 none either; each says so for itself.
    assert stay["[[0], [1]]"] == {0: [2], 1: [1]} and stay["[[1]]"] == {1: [1]}
    few = [asked_of({0, 1}, 2), asked_of({32, 33}, 2)]
    assert RowSlots(table_spec(6), 2, "lfu").staying(asked, few).rows == {}
    alone = RowSlots(table_spec(6), 2, "lfu", [[0], [1]]).staying(asked, few).rows
    assert {owner: rows.tolist() for owner, rows in alone.items()} == {0: [0, 1]}


def test_use_that_is_not_recorded_leaves_the_choice_as_it_was(table_spec):
    rows = [{1, 2, 3}, {4, 5, 6}, {7, 8, 9}]
    choices = []
    for evaluations in (0, 3):
        slots = RowSlots(table_spec(6), 1, "lfu")
        for batch in rows[:2] * 2:
            slots.assign(asked_of(batch, 1))
        for _ in range(evaluations):
            slots.assign(asked_of({4, 5}, 1), record=False)
        slots.assign(asked_of({1, 2, 3}, 1))
        choices.append(set(slots.assign(asked_of(rows[2], 1)).assignments[0].evicted))
    assert choices == [{4, 5, 6}] * 2


def test_moves_have_few_sizes_and_little_padding():
    sizes = [_room(number) for number in range(100_000)]
    assert sizes[0] == 0 and sizes[1] == 16
    assert all(size >= number for number, size in enumerate(sizes))
    assert all(size < 1.25 * number for number, size in enumerate(sizes) if number > 16)
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 4 * 13 + 2
