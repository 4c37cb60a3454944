"""Keys and values of the positions so far, so that a new token attends to them without a rerun."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NewCache:
    """Room for what one attention layer is to remember; nothing is in it yet. slots: T."""

    slots: int = dataclasses.field(metadata={"static": True})

    def extend(self, keys_BxLxKxD, values_BxLxKxD, lengths_B: jax.Array) -> "LayerCache":
        """The first `lengths_B` of L positions, L at most T."""
        empty = self.slots - keys_BxLxKxD.shape[1]
        keys, values = (
            jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, empty), (0, 0)))
            for x in (keys_BxLxKxD, values_BxLxKxD)
        )
        return LayerCache(keys, values, lengths_B)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What one attention layer remembers: position p of a sequence is in its slot p of T.

    keys, values: [B, K, T, Dh] in the compute dtype, in the order in which products read them, keys
    already rotated. lengths: [B] int32, positions that each sequence has; what is in the slots
    behind them is never read. window: of T, slots that some sequence may have come to; no attention
    looks further. None: all.
    """

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def seen(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values within the window."""
        return self.keys[:, :, : self.window], self.values[:, :, : self.window]

    def extend(self, keys_BxLxKxD, values_BxLxKxD, lengths_B: jax.Array) -> "LayerCache":
        """Adds the first `lengths_B` of L positions; the caller sees to it that slots are left.

        Of a sequence that adds fewer, the others lie behind its end, or beyond the last slot, where
        they are dropped.
        """
        sequences_Bx1 = jnp.arange(len(self.lengths))[:, None]
        slots_BxL = self.lengths[:, None] + jnp.arange(keys_BxLxKxD.shape[1])

        def write(slots, new):
            place = slots.at[sequences_Bx1, :, slots_BxL]
            return place.set(new.astype(slots.dtype), mode="drop")

        keys, values = write(self.keys, keys_BxLxKxD), write(self.values, values_BxLxKxD)
        return LayerCache(keys, values, self.lengths + lengths_B, self.window)

    def beginning_at(self, first_B: jax.Array, end_B: jax.Array) -> "LayerCache":
        """The positions from `first_B` up to `end_B` of each sequence alone; counted from 0."""
        last = self.keys.shape[2] - 1
        slots_BxT = jnp.minimum(first_B[:, None] + jnp.arange(last + 1), last)
        keys, values = (
            jnp.take_along_axis(x, slots_BxT[:, None, :, None], axis=2)
            for x in (self.keys, self.values)
        )
        return LayerCache(keys, values, end_B - first_B)
