"""Which row a key has, and which shard a row lives on.

Keys of a language come in order of frequency, so contiguous blocks of keys would give the first
shard most of the traffic. Rows are spread by `row = key * A mod V_pad`, with A coprime to V_pad and
near 0.618 V_pad: neighbouring keys land far apart, evenly over any number of contiguous blocks.

With 8 rows and A = 5, keys 0..7 have rows 0 5 2 7 4 1 6 3; on 2 shards of 4 rows the four most
frequent keys split two and two.

Hashed keys are spread already: of them a key is its own row.

The layout depends on the number of keys alone, so a table is the same on every mesh.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from stem_jax.errors import InputError

_GOLDEN = (5**0.5 - 1) / 2
# Rows are int32, and so is V_pad, which stands for none.
_MAX_ROWS = (1 << 31) - 1
_DIGIT_BITS = 8
# Up to here Horner's scheme takes digits of 8 bits: in uint32 it needs 2^8 * V_pad < 2^32.
_DIGITS_FIT = 1 << (32 - _DIGIT_BITS)


@dataclasses.dataclass(frozen=True)
class TableLayout:
    """The bijection between padded keys and rows.

    spread: keys fall evenly on all numbers below `num_keys`, as hashed ones do.
    """

    num_keys: int
    pad_multiple: int
    spread: bool = False

    def __post_init__(self):
        if self.num_rows > _MAX_ROWS:
            raise InputError(
                f"a table of {self.num_rows} rows is over the {_MAX_ROWS} rows that a layout "
                "can address (row numbers are int32); use fewer keys"
            )

    @property
    def num_rows(self) -> int:
        """V_pad: the number of keys, rounded up to the multiple."""
        return -(-self.num_keys // self.pad_multiple) * self.pad_multiple

    @functools.cached_property
    def multiplier(self) -> int:
        """A: the number coprime to V_pad that is nearest to 0.618 V_pad; 1 for spread keys."""
        if self.spread:
            return 1
        target = round(self.num_rows * _GOLDEN)
        return next(
            candidate
            for distance in range(self.num_rows)
            for candidate in (target - distance, target + distance)
            if candidate > 0 and math.gcd(candidate, self.num_rows) == 1
        )

    def rows_of(self, keys: jax.Array) -> jax.Array:
        """Rows of keys on the device, int32 of the same shape; keys must lie in [0, V_pad)."""
        if self.spread:
            return keys.astype(jnp.int32)
        if self.num_rows > _DIGITS_FIT:
            return self._rows_bit_by_bit(keys.astype(jnp.uint32)).astype(jnp.int32)
        modulus, factor = jnp.uint32(self.num_rows), jnp.uint32(self.multiplier)
        rows = jnp.zeros(keys.shape, jnp.uint32)
        # key * A overflows 32 bits, so the key enters digit by digit, the highest first.
        for shift in range(24 - _DIGIT_BITS, -1, -_DIGIT_BITS):
            digit = (keys.astype(jnp.uint32) >> shift) & (2**_DIGIT_BITS - 1)
            rows = ((rows << _DIGIT_BITS) % modulus + digit * factor % modulus) % modulus
        return rows.astype(jnp.int32)

    def _rows_bit_by_bit(self, keys: jax.Array) -> jax.Array:
        """Doubled and added to, remainders below 2^31 stay below 2^32; no division is needed."""
        modulus, factor = jnp.uint32(self.num_rows), jnp.uint32(self.multiplier)

        def reduced(sums):
            return jnp.where(sums >= modulus, sums - modulus, sums)

        rows = jnp.zeros_like(keys)
        for bit in reversed(range((self.num_rows - 1).bit_length())):
            rows = reduced(rows + rows)
            rows = reduced(rows + jnp.where((keys >> bit) & 1 != 0, factor, jnp.uint32(0)))
        return rows

    def row_numbers(self, keys: np.ndarray) -> np.ndarray:
        """Rows of keys on the host, int64 of the same shape."""
        return np.asarray(keys, np.int64) * self.multiplier % self.num_rows

    def key_numbers(self, rows: np.ndarray) -> np.ndarray:
        """Keys of rows on the host, int64 of the same shape; keys >= num_keys are padding."""
        inverse = pow(self.multiplier, -1, self.num_rows)
        return np.asarray(rows, np.int64) * inverse % self.num_rows
