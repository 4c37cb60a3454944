"""The keys of n-grams on the device, for decoding: 64-bit arithmetic in pairs of uint32.

What `NGramMemory.keys` does in int64 on the host, where resident rows would wait for it. A number
below 2^63 is a pair (high, low): JAX has 64-bit integers only for whole programs, and not by
default.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from stem_jax.memory.preceding import preceding

if TYPE_CHECKING:
    from stem_jax.memory.ngram import NGramMemory

_LOW = 2**32 - 1


def keys_on_device(
    memory: "NGramMemory",
    tokens_BxL: jax.Array,
    segment_ids_BxL: jax.Array,
    before_BxR: jax.Array | None = None,
) -> jax.Array:
    """The same int32 [..., L, K] as on the host, see `Memory.keys`; may be traced."""
    read_BxLxN = jnp.stack(
        preceding(tokens_BxL, segment_ids_BxL, before_BxR, memory.reach, memory.eos_id, jnp), -1
    ).astype(jnp.uint32)
    # By layer: Y of them.
    multipliers_YxN = np.array(memory.multipliers, np.int64)
    products = _product(
        read_BxLxN[..., None, :],
        jnp.asarray(multipliers_YxN >> 32, jnp.uint32),
        jnp.asarray(multipliers_YxN & _LOW, jnp.uint32),
    )
    mixed = []
    for part_BxLxYxN in products:
        orders = [part_BxLxYxN[..., 0]]
        for order in range(1, memory.max_order):
            orders.append(orders[-1] ^ part_BxLxYxN[..., order])
        # One for each head of an order.
        mixed.append(jnp.repeat(jnp.stack(orders[1:], -1), memory.heads, -1))
    sizes_YxK = np.array(memory.head_sizes)
    high, low = mixed
    keys_BxLxYxK = _remainder(high, low, sizes_YxK).astype(jnp.int32)
    keys_BxLxYxK += jnp.asarray(memory.head_offsets, jnp.int32)
    return keys_BxLxYxK.reshape(*tokens_BxL.shape, -1)


def _product(number: jax.Array, high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A number below 2^32 times a pair, below 2^64."""
    # The upper half of number * low, by halves of 16 bits; no sum reaches 2^32.
    (a1, a0), (b1, b0) = ((x >> 16, x & 0xFFFF) for x in (number, low))
    first = a1 * b0 + (a0 * b0 >> 16)
    second = a0 * b1 + (first & 0xFFFF)
    carried = a1 * b1 + (first >> 16) + (second >> 16)
    return number * high + carried, number * low


def _remainder(high: jax.Array, low: jax.Array, divisors: np.ndarray) -> jax.Array:
    """A pair modulo divisors below 2^31, uint32."""
    by = jnp.asarray(divisors, jnp.uint32)
    rest = high % by
    # Digit by digit, the highest first, as many bits at once as a remainder leaves free.
    left, free = 32, 32 - int(divisors.max()).bit_length()
    while left:
        bits = min(free, left)
        left -= bits
        rest = (rest << bits | (low >> left) & (2**bits - 1)) % by
    return rest
