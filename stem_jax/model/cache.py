"""Keys and values of the positions so far, so that a new token attends to them without a rerun."""

import dataclasses

import jax
import jax.numpy as jnp

from stem_jax.config import ModelConfig

# No position has this segment id, so an empty slot matches no query.
_EMPTY = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What one attention layer remembers, in T slots that fill from the left.

    keys, values: [B, T, K, Dh] in the compute dtype, keys already rotated. segment_ids: [B, T]
    int32, -1 in slots that are still empty. length: scalar int32, slots written so far.
    """

    keys: jax.Array
    values: jax.Array
    segment_ids: jax.Array
    length: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, slots: int) -> "LayerCache":
        """A cache of `slots` empty slots for `batch` sequences."""
        shape = (batch, slots, config.num_kv_heads, config.head_dim)
        zeros = jnp.zeros(shape, config.compute_dtype)
        ids_BxT = jnp.full((batch, slots), _EMPTY, jnp.int32)
        return cls(zeros, zeros, ids_BxT, jnp.zeros((), jnp.int32))

    def extend(self, keys_BxLxKxD, values_BxLxKxD, segment_ids_BxL) -> "LayerCache":
        """Writes L positions into the next L slots; the caller sees to it that they exist."""

        def write(slots, new, start):
            return jax.lax.dynamic_update_slice(slots, new.astype(slots.dtype), start)

        return LayerCache(
            keys=write(self.keys, keys_BxLxKxD, (0, self.length, 0, 0)),
            values=write(self.values, values_BxLxKxD, (0, self.length, 0, 0)),
            segment_ids=write(self.segment_ids, segment_ids_BxL, (0, self.length)),
            length=self.length + keys_BxLxKxD.shape[1],
        )
