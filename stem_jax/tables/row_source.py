"""Where a forward pass without gradients takes its rows from.

A source has a part on the host and a part on the device. Before a program runs, `serve` sees the
keys and returns a pytree, which goes into the program; inside, the pytree's `block` gives the rows.
Resident rows need no host work, so nothing waits for the keys. A source with rows on the host reads
the keys in `serve` and returns the rows it has transferred.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from stem_jax.mesh import BATCH_AXES, axis_size, divided, live_axes
from stem_jax.tables.spec import TableSpec


class ServedRows(Protocol):
    """A pytree that a compiled program reads rows from.

    blocks: P, shards of the batch; B is a multiple of it.
    """

    @property
    def blocks(self) -> int: ...

    def block(self, keys_BxL: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
        """Rows [S, P * U, F] in `dtype`, the block of each shard of the batch after the other, and
        the index of each key's row in the block of its shard: int32 [B, L], or [B, L, K].
        """
        ...


class RowSource(Protocol):
    """What a host loop asks before it runs a program on these keys.

    room: distinct keys that it can serve at a time; None: any number.
    """

    @property
    def room(self) -> int | None: ...

    def serve(self, keys: jax.Array) -> ServedRows:
        """The rows for int32 keys of any shape, on the device and perhaps not computed yet."""

    def fix_shapes(self, most_keys: int) -> None:
        """Shapes of what is served follow from those of the keys alone from now on.

        Args:
            most_keys: at a time; what it takes to bring so many rows is compiled.
        """

    def close(self) -> None:
        """Ends the threads that bring rows, if it or the source it reads from has any."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ResidentRows:
    """A table that lies whole on the devices; each key gets a row of the block of its own.

    rows: stored, [S, V_pad, F]. spec: its layout and sharding. mesh: None on a single
    device without a mesh.
    """

    rows: jax.Array
    spec: TableSpec = dataclasses.field(metadata={"static": True})
    mesh: Mesh | None = dataclasses.field(metadata={"static": True})

    @property
    def blocks(self) -> int:
        """See `ServedRows`."""
        return 1 if self.mesh is None else axis_size(self.mesh, BATCH_AXES)

    @property
    def room(self) -> None:
        """See `RowSource`."""
        return None

    def fix_shapes(self, most_keys: int) -> None:
        """See `RowSource`; nothing is brought."""

    def serve(self, keys: jax.Array) -> "ResidentRows":
        return self

    def close(self) -> None:
        """See `RowSource`."""

    def block(self, keys_BxL: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
        """See `ServedRows`; columns follow the table's."""
        of_each = keys_BxL.size // self.blocks
        inverse_BxL = (jnp.arange(keys_BxL.size, dtype=jnp.int32) % of_each).reshape(keys_BxL.shape)
        rows_U = self.spec.layout.rows_of(keys_BxL.reshape(-1))
        if divided(self.mesh) is None:
            return self.rows[:, rows_U].astype(dtype), inverse_BxL
        take = jax.shard_map(
            lambda shard, rows: self._take(shard, rows).astype(dtype),
            mesh=self.mesh,
            in_specs=(self.spec.row_spec, PartitionSpec(BATCH_AXES)),
            out_specs=PartitionSpec(None, BATCH_AXES, "tensor"),
            check_vma=False,
        )
        return take(self.rows, rows_U), inverse_BxL

    def _take(self, shard_SxRxF: jax.Array, rows_U: jax.Array) -> jax.Array:
        """The rows of the own shard of the batch, from all that hold some of them."""
        axes = live_axes(self.mesh, *self.spec.vocab_axes)
        if not axes:
            return shard_SxRxF[:, rows_U]
        size = shard_SxRxF.shape[1]
        asked_N = jax.lax.all_gather(rows_U, axes, tiled=True)
        place_N = asked_N - jax.lax.axis_index(axes) * size
        mine_N = (place_N >= 0) & (place_N < size)
        taken_SxNxF = shard_SxRxF[:, jnp.clip(place_N, 0, size - 1)]
        taken_SxNxF = jnp.where(mine_N[:, None], taken_SxNxF, 0)
        # One owner has the row, the others add zeros, so the sum is exact.
        return jax.lax.psum_scatter(taken_SxNxF, axes, scatter_dimension=1, tiled=True)
