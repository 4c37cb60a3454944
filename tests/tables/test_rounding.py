"""Rounding to bfloat16 at random: unbiased, exact where it can be, the same wherever rows lie."""

import jax
import jax.numpy as jnp
import numpy as np

from stem_jax.tables.rounding import rounded, write_key

KEYS, WIDTH = 10_000, 8
ROWS = jnp.arange(KEYS, dtype=jnp.int32)
COLUMNS = jnp.arange(WIDTH, dtype=jnp.int32)[None]
# The distance of two numbers of bfloat16 from 1 on.
STEP = 2.0**-7


@jax.jit
def _up(values_N, key):
    """Whether each number was rounded up: all of a row of 1 + its share of a step."""
    values = jnp.broadcast_to(values_N[None, :, None], (1, len(values_N), WIDTH))
    return rounded(values, key, ROWS, COLUMNS)[0].astype(jnp.float32) > 1


def test_up_as_often_as_it_is_near():
    """Over 10^4 keys, over columns, over updates and over seeds, each at its own rate."""
    for share in (1 / 16, 0.25, 0.5, 0.9):
        values = jnp.full(KEYS, 1 + share * STEP, jnp.float32)
        ups = np.stack([_up(values, write_key(seed, jnp.int32(t), 0))
                        for seed in (0, 7) for t in range(1, 17)])  # fmt: skip
        # Of each key over columns, updates and seeds; of each column over all else, and so on.
        for axes in [(1, 2), (0, 2), (0, 1), (0, 1, 2)]:
            found, number = ups.mean(axes), np.prod([ups.shape[axis] for axis in axes])
            deviation = np.sqrt(share * (1 - share) / number)
            assert np.max(np.abs(found - share)) < 6 * deviation, (share, axes)
            # Nor more even than chance: the square of the deviations is theirs.
            if np.size(found) > 1000:
                spread = np.mean(np.square((found - share) / deviation))
                assert 0.9 < spread < 1.1, (share, axes)


def test_neighbours_are_rounded_apart():
    """Rows, columns, updates, fields and seeds that follow each other share no noise."""
    values = jnp.full(KEYS, 1 + STEP / 2, jnp.float32)
    whole = np.asarray(_up(values, write_key(3, jnp.int32(5), 1))) * 2.0 - 1
    others = {
        "update": _up(values, write_key(3, jnp.int32(6), 1)),
        "field": _up(values, write_key(3, jnp.int32(5), 2)),
        "seed": _up(values, write_key(4, jnp.int32(5), 1)),
    }
    pairs = {name: (whole, np.asarray(other) * 2.0 - 1) for name, other in others.items()}
    pairs |= {"row": (whole[1:], whole[:-1]), "column": (whole[:, 1:], whole[:, :-1])}
    pairs |= {"diagonal": (whole[1:, 1:], whole[:-1, :-1])}
    for name, (one, other) in pairs.items():
        assert abs(np.mean(one * other)) < 5 / np.sqrt(one.size), name


def test_what_bfloat16_has_stays():
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(2, 50, WIDTH)).astype(jnp.bfloat16).astype(np.float32)
    special = np.float32([0.0, -0.0, np.inf, -np.inf, 1e-40, -3.4e38])
    exact[0, 0, :6] = special.astype(jnp.bfloat16).astype(np.float32)
    columns = jnp.arange(2 * WIDTH, dtype=jnp.int32).reshape(2, WIDTH)
    for update in range(20):
        found = rounded(jnp.asarray(exact), write_key(1, jnp.int32(update), 0), ROWS[:50], columns)
        assert found.dtype == jnp.bfloat16
        bits = np.asarray(found).view(np.uint16), exact.astype(jnp.bfloat16).view(np.uint16)
        np.testing.assert_array_equal(*bits)
    worst = np.uint32([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001]).view(np.float32)
    nans = jnp.broadcast_to(jnp.asarray(worst)[None, :, None], (1, 3, WIDTH))
    assert np.isnan(
        np.float32(rounded(nans, write_key(1, jnp.int32(1), 0), ROWS[:3], COLUMNS))
    ).all()


def test_one_of_the_two_next_numbers():
    rng = np.random.default_rng(1)
    values = (
        rng.normal(size=(1, KEYS, WIDTH)) * 10.0 ** rng.integers(-20, 20, (1, KEYS, 1))
    ).astype(np.float32)
    found = np.float32(rounded(jnp.asarray(values), write_key(1, jnp.int32(1), 0), ROWS, COLUMNS))
    down = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    up = ((values.view(np.uint32) & np.uint32(0xFFFF0000)) + np.uint32(0x10000)).view(np.float32)
    assert np.all((found == down) | (found == up))
    assert 0.4 < np.mean(found == up) < 0.6


def test_a_part_is_rounded_as_in_the_whole():
    """Rows in another order, some of the columns, some of the vectors."""
    rng = np.random.default_rng(2)
    values = rng.normal(size=(3, 40, WIDTH)).astype(np.float32)
    columns = jnp.arange(3 * WIDTH, dtype=jnp.int32).reshape(3, WIDTH)
    key = write_key(1, jnp.int32(9), 2)
    whole = np.asarray(rounded(jnp.asarray(values), key, ROWS[:40] + 2**30, columns))
    order = rng.permutation(40)[:17]
    part = rounded(values[1:2, order, 3:6], key, ROWS[order] + 2**30, columns[1:2, 3:6])
    np.testing.assert_array_equal(np.asarray(part), whole[1:2, order, 3:6])
