"""Lists of rows as they travel: their slots, and what stands at an index past the end."""

import jax
import jax.numpy as jnp


def slots_of(peer_N: jax.Array, real_N: jax.Array, peers: int, capacity: int):
    """Where each peer's rows start among those listed; row of each slot; slot of each row."""
    size = peer_N.shape[0]
    peer_N = jnp.where(real_N, peer_N, peers)
    starts = jnp.sum(peer_N < jnp.arange(peers + 1)[:, None], axis=1, dtype=jnp.int32)
    place = starts[:-1, None] + jnp.arange(capacity, dtype=jnp.int32)
    sent = jnp.where(place < starts[1:, None], place, size).reshape(-1)
    slot_N = peer_N * capacity + jnp.arange(size, dtype=jnp.int32) - starts[peer_N]
    return starts, sent, jnp.minimum(slot_N, peers * capacity - 1)


def taken(values_N: jax.Array, index: jax.Array, empty) -> jax.Array:
    """Values at the indices, and `empty` for those past the end."""
    size = values_N.shape[0]
    return jnp.where(index < size, values_N[jnp.minimum(index, size - 1)], empty)


def whole_sums(numbers: jax.Array, index: jax.Array, room: int) -> jax.Array:
    """Whole numbers summed by index; those past the end are dropped."""
    return jnp.zeros(room, jnp.int32).at[index].add(numbers, mode="drop")


def of_vector(rows_SxNxW: jax.Array, vector: int, pick_M: jax.Array) -> jax.Array:
    """Rows [M, W] of one vector, gathered from all: a slice of them would be a copy."""
    _, number, width = rows_SxNxW.shape
    return rows_SxNxW.reshape(-1, width)[vector * number + pick_M]


def resized(rows: jax.Array, size: int, fill=0, axis: int = 0) -> jax.Array:
    """The first rows, or all and `fill` behind them."""
    more = max(0, size - rows.shape[axis])
    padding = [(0, more if number == axis else 0) for number in range(rows.ndim)]
    rows = jax.lax.slice_in_dim(rows, 0, min(size, rows.shape[axis]), axis=axis)
    return jnp.pad(rows, padding, constant_values=fill)
