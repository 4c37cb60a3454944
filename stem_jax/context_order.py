"""Which positions of a sequence lie on which device along the mesh axis `context`.

A sequence of L positions is cut into 2C chunks for C devices, and device i has chunks i and
2C - 1 - i: under a causal mask a chunk costs what lies before it, so each pair costs the same.
Whatever belongs to a position (token, target, place in its document, number of the document) goes
with it; masks and rotary angles read those and never an index into the array.

Example: 8 positions on 2 devices are 4 chunks. Device 0 has the positions 0 1 6 7, device 1 has
2 3 4 5.
"""

import jax
import jax.numpy as jnp
import numpy as np


def slots(length: int, devices: int) -> np.ndarray:
    """[L] int32, the position in its sequence of what lies at each index, device after device.

    Args:
        length: L, a multiple of twice the devices.
        devices: along `context`.
    """
    chunks = np.arange(length, dtype=np.int32).reshape(2 * devices, -1)
    pairs = [(chunks[i], chunks[2 * devices - 1 - i]) for i in range(devices)]
    return np.concatenate([chunk for pair in pairs for chunk in pair])


def in_sequence_order(x: jax.Array, axis: int, devices: int) -> jax.Array:
    """The inverse: an array whose `axis` has the positions as `slots` says, in their own order."""
    if devices == 1:
        return x
    chunks = jnp.split(x, 2 * devices, axis)
    return jnp.concatenate([*chunks[0::2], *chunks[-1::-2]], axis)
