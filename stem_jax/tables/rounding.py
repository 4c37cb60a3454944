"""Stochastic rounding of float32 to bfloat16 by numbers that depend on no placement.

A number between two of bfloat16 becomes the upper one as often as it is near it, so that updates
smaller than the distance of the two are not lost but taken in as many times as they amount to. The
16 random bits of a number are a function of what it is (seed, update, field, row, column of the
whole row) and not of where it lies: a row is rounded the same on any mesh, in any slot.
"""

import jax
import jax.numpy as jnp

# Of MurmurHash3's finaliser, and the golden ratio, 2^32 / 1.618.
_FIRST, _SECOND, _GOLDEN = 0x85EBCA6B, 0xC2B2AE35, 0x9E3779B9
_LOW = 0xFFFF


def write_key(seed: int, update: jax.Array, field: int) -> jax.Array:
    """uint32 of one field's write in one update."""
    key = _mixed(jnp.uint32(seed & 0xFFFFFFFF) + jnp.uint32((_GOLDEN * (field + 1)) & 0xFFFFFFFF))
    return _mixed(key + update.astype(jnp.uint32))


def rounded(values_SxOxF: jax.Array, key: jax.Array, rows_O, columns_SxF) -> jax.Array:
    """float32 in bfloat16, up or down as the key says; what bfloat16 has stays as it is.

    Args:
        key: of `write_key`.
        rows_O: int32, numbers of the rows in the whole table.
        columns_SxF: int32, numbers of the columns in a whole row of all its vectors.
    """
    # Two words of each row: with one, some rows of a large table would be rounded alike.
    row_O = _mixed(rows_O.astype(jnp.uint32) + key)
    other_O = _mixed(row_O + jnp.uint32(_GOLDEN))
    word = columns_SxF.astype(jnp.uint32)[:, None] * jnp.uint32(_GOLDEN) + row_O[:, None]
    noise = _mixed(word, other_O[:, None]) >> 16
    bits = jax.lax.bitcast_convert_type(values_SxOxF, jnp.uint32)
    # Added below the bits that stay: a carry is a step up. Infinity has none there to be carried.
    up = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(~_LOW & 0xFFFFFFFF), jnp.float32)
    return jnp.where(jnp.isnan(values_SxOxF), values_SxOxF, up).astype(jnp.bfloat16)


def _mixed(word: jax.Array, other: jax.Array | int = 0) -> jax.Array:
    """Every bit of a uint32, and of another between, in every bit of the result."""
    word ^= word >> 16
    word *= jnp.uint32(_FIRST)
    word ^= jnp.asarray(other, jnp.uint32)
    word ^= word >> 13
    word *= jnp.uint32(_SECOND)
    return word ^ (word >> 16)
