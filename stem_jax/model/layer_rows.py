"""Rows on their way through the layers: each takes what it reads, the rest goes on.

On the way back the gradients of a memory's rows are gathered in one array that goes through the
layers in the other direction; see `tables.lookup`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from stem_jax.model.inputs import RowIndex
from stem_jax.model.row_reads import RowRead, RowReads
from stem_jax.tables.lookup import LayerRows, close_rows, lookup, open_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerVectors:
    """What one layer reads.

    own: rows that it looks up itself. ahead: [T, B, L, K, F] of a memory, looked up before. places:
    of the former the vector, of the latter the first key and which of the T vectors; numbers.
    reads: how.
    """

    own: dict[str, LayerRows]
    ahead: dict[str, jax.Array]
    places: dict[str, Any]
    reads: tuple[RowRead, ...] = dataclasses.field(metadata={"static": True})

    def look_up(
        self, index: Mapping[str, RowIndex], mesh: Mesh | None
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Of each memory the vectors of each token: for a kind [B, L, F], for a reader
        [B, L, K, F]; and the threads of the rows for the next layer.
        """
        found, threads = {}, {}
        for read in self.reads:
            name = read.memory
            if name in self.own:
                at = index[name]
                values, threads[name] = lookup(
                    self.own[name], self.places[name], at.inverse, at.order, mesh
                )
                is_single = values.ndim == 3 and read.reader is not None
                found[name] = values[:, :, None] if is_single else values
            else:
                first, number = self.places[name]
                values = jax.lax.dynamic_index_in_dim(self.ahead[name], number, keepdims=False)
                values = jax.lax.dynamic_slice_in_dim(values, first, read.count, axis=2)
                found[name] = values[:, :, 0] if read.reader is None else values
        return found, threads


@dataclasses.dataclass(frozen=True)
class OpenRows:
    """All rows between the first layer and the last; see `LayerVectors`."""

    own: dict[str, LayerRows]
    ahead: dict[str, jax.Array]
    vectors: dict[str, list[int]]

    @classmethod
    def of(
        cls,
        reads: RowReads,
        rows: Mapping[str, jax.Array],
        sums: Mapping[str, jax.Array],
        index: Mapping[str, RowIndex],
        mesh: Mesh | None,
    ) -> "OpenRows":
        """From the row blocks; see `lookup.open_rows`."""
        own = {
            name: open_rows(rows[name], sums.get(name), reads.reads_every_vector(name))
            for name in reads.memories
        }
        ahead = {}
        for name in reads.ahead:
            values, at = [], index[name]
            for vector in reads.vectors[name]:
                value, thread = lookup(own[name], vector, at.inverse, at.order, mesh)
                own[name] = dataclasses.replace(own[name], thread=thread)
                values.append(value if value.ndim == 4 else value[:, :, None])
            ahead[name] = jnp.stack(values)
        return cls(own, ahead, reads.vectors)

    @property
    def threads(self) -> dict[str, jax.Array]:
        """What goes from layer to layer, and never is read."""
        return {name: rows.thread for name, rows in self.own.items()}

    def after(self, threads: Mapping[str, jax.Array]) -> "OpenRows":
        """The same with some threads as a layer left them."""
        # Alone: vectors that had come out of a block would be kept for every group of a scan.
        own = {
            name: dataclasses.replace(rows, thread=threads[name]) if name in threads else rows
            for name, rows in self.own.items()
        }
        return dataclasses.replace(self, own=own)

    def places(self, reads: tuple[RowRead, ...]) -> dict[str, Any]:
        """Where a layer reads; see `LayerVectors`."""
        return {
            read.memory: (read.first, self.vectors[read.memory].index(read.vector))
            if read.memory in self.ahead
            else read.vector
            for read in reads
        }

    def of_layer(self, reads: tuple[RowRead, ...], places: dict[str, Any]) -> LayerVectors:
        """What a layer takes."""
        names = {read.memory for read in reads}
        own = {name: self.own[name] for name in names if name not in self.ahead}
        ahead = {name: self.ahead[name] for name in names if name in self.ahead}
        return LayerVectors(own, ahead, places, reads)

    def close(self, x: jax.Array, mesh: Mesh | None) -> jax.Array:
        """x after the last layer, where the way back begins."""
        for rows in self.own.values():
            x = close_rows(x, rows, mesh)
        return x
