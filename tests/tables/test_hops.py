"""Factors of the owners into hops, and levels of sizes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stem_jax.tables import block_sizes
from stem_jax.tables.block_sizes import BlockSizes, choose_sizes, sizes_at
from stem_jax.tables.hops import Hop, factors


@pytest.mark.parametrize(
    ("owners", "most", "expected"),
    [
        (1, 3, ()),
        (2, 3, (2,)),
        (64, 3, (64,)),
        (96, 3, (8, 12)),
        (256, 3, (16, 16)),
        (4096, 3, (64, 64)),
        (65536, 3, (32, 32, 64)),
        (4096, 2, (64, 64)),
        (65536, 2, (256, 256)),
        (122, 3, (2, 61)),
        (127, 3, (127,)),
    ],
)
def test_factors(owners, most, expected):
    assert factors(owners, most, 64) == expected


def test_the_example_of_the_hops():
    assert Hop(3, 1).groups(6) == [[0, 1, 2], [3, 4, 5]]
    assert Hop(2, 3).groups(6) == [[0, 3], [1, 4], [2, 5]]


sizes = st.builds(
    BlockSizes,
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.tuples(st.integers(0, 900), st.integers(0, 900)),
    st.tuples(st.integers(1, 5000)),
)


@given(sizes, sizes)
def test_levels(first, needed):
    largest = BlockSizes(5000, 5000, (900, 900), (5000,))
    levels = [sizes_at(level, first, largest) for level in range(block_sizes.LEVELS)]
    assert len(levels) == 4 and levels[0].hold(first) and levels[-1] == largest
    for smaller, larger in itertools.pairwise(levels):
        assert larger.hold(smaller) and largest.hold(larger)
    chosen = choose_sizes(needed, first, largest)
    assert chosen.hold(needed) and chosen in levels
    assert not any(level.hold(needed) for level in levels[: levels.index(chosen)])
    # Little room is left over.
    for room, number in zip(levels[0].numbers, first.numbers):
        assert room <= max(256, 1.125 * (1.03 * number + 4 * number**0.5) + 1)
    assert first.with_numbers(first.numbers) == first


@pytest.mark.parametrize("keys", [1, 5, 32768])
@pytest.mark.parametrize("peers", [(), (8,), (64, 64), (2, 3, 4)])
def test_the_largest_sizes_hold_the_worst(keys, peers):
    stride, found = 1, []
    for number in peers:
        found.append(Hop(number, stride))
        stride *= number
    rows = 12 * 4096
    largest = block_sizes.largest_sizes(keys, rows, tuple(found), stride, 2)
    assert largest.unique == min(keys, rows)
    # One owner is asked for all, and all keys of its group pass through one relay.
    reached, devices = rows, 1
    for number, pair, room in zip(peers, largest.pairs, (*largest.relayed, rows)):
        reached, devices = reached // number, devices * number
        assert pair <= reached and room >= min(reached, devices * keys)
        assert pair >= min(reached, devices // number * keys)
    assert largest.owned >= min(rows // stride, 2 * stride * keys)
