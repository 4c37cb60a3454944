"""What a step has of the tables: which rows its batch asks for, and their way there and back.

Everything goes by memory: {name: ...}, nothing for a dense model. Between `fetch` and `update` lie
the model and its gradients, which know of row blocks alone.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from stem_jax.memory.memory import prefix
from stem_jax.mesh import CONTEXT, TOKEN_AXES, axis_size
from stem_jax.parts import part
from stem_jax.tables.asked_rows import AskedRows
from stem_jax.tables.block_sizes import (
    BlockSizes,
    level_of,
    levels_above,
    nearly_filled,
    sizes_at,
)
from stem_jax.tables.requests import Requests
from stem_jax.tables.sharded_table import Demand, ShardedTable
from stem_jax.tables.spec import TableState
from stem_jax.training.batch import Batch
from stem_jax.training.blueprint import Blueprint
from stem_jax.training.optimizer import clip_factor
from stem_jax.training.schedule import Schedule
from stem_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class ReadSizes(Mapping[str, BlockSizes]):
    """Sizes of the row blocks of every memory: what a step is compiled for."""

    of: tuple[tuple[str, BlockSizes], ...]

    def __getitem__(self, name: str) -> BlockSizes:
        return dict(self.of)[name]

    def __iter__(self):
        return iter(dict(self.of))

    def __len__(self) -> int:
        return len(self.of)


class Reads:
    """The tables of a blueprint."""

    def __init__(self, blueprint: Blueprint):
        self.memories = blueprint.memories
        self.specs = blueprint.specs
        self._mesh = blueprint.mesh
        self._dtype = jnp.dtype(blueprint.config.model.compute_dtype)
        # Keys of a batch by the shape of its tokens.
        self._num_keys: dict[tuple[int, ...], dict[str, int]] = {}
        # What the first batch needed, by the keys of a device.
        self._first_needs: dict[tuple[int, ...], dict[str, BlockSizes]] = {}

    @property
    def offloaded(self) -> list[str]:
        """Memories of which some rows are in host memory."""
        return [name for name, spec in self.specs.items() if spec.offloaded]

    def keys(self, batch: Batch) -> dict[str, jax.Array]:
        """The keys of a batch: [A, B, L], or [A, B, L, K]."""
        # Positions along `context` are not in their order: what looks back comes with the batch.
        assert self._mesh.shape[CONTEXT] == 1 or all(
            name in batch.keys for name, memory in self.memories.items() if memory.reach
        )
        return {
            name: batch.keys[name]
            if name in batch.keys
            else memory.keys(batch.tokens, batch.segment_ids)
            for name, memory in self.memories.items()
        }

    def tables(self, batch: Batch, sizes: ReadSizes | None = None) -> dict[str, ShardedTable]:
        """The tables as a step of this batch exchanges them."""
        shape = batch.tokens.shape
        # Asked for several times in each step, on the host: traced once.
        if shape not in self._num_keys:
            keys = jax.eval_shape(self.keys, batch)
            self._num_keys[shape] = {name: array.size for name, array in keys.items()}
        devices = axis_size(self._mesh, TOKEN_AXES)
        return {
            name: ShardedTable(
                self.specs[name],
                self._mesh,
                number // devices,
                None if sizes is None else sizes[name],
            )
            for name, number in self._num_keys[shape].items()
        }

    def demand(self, batch: Batch, whole: bool = False) -> dict[str, Demand]:
        """What a batch asks of the tables."""
        tables, keys, valid = self.tables(batch), self.keys(batch), batch.segment_ids > 0
        return {
            name: table.demand(keys[name], valid, whole=whole) for name, table in tables.items()
        }

    def sizes_for(self, batch: Batch, demand: dict[str, Demand]) -> ReadSizes:
        """One of a few levels, the same for all memories, of a batch whose demand is known."""
        needed, first, largest = self._known(batch, demand)
        level = max((level_of(needed[n], first[n], largest[n]) for n in needed), default=0)
        return ReadSizes(tuple((n, sizes_at(level, first[n], largest[n])) for n in first))

    def larger_sizes(
        self, batch: Batch, demand: dict[str, Demand], sizes: ReadSizes, *, near: bool
    ) -> list[ReadSizes]:
        """Levels above the one of a batch; with `near` the next, if this batch nearly needs it."""
        needed, first, largest = self._known(batch, demand)
        levels = levels_above(tuple(sizes.values()), list(first.values()), list(largest.values()))
        above = [ReadSizes(tuple(zip(first, level, strict=True))) for level in levels]
        if not near:
            return above
        filled = any(nearly_filled(sizes[n], needed[n], first[n]) for n in needed)
        return above[:1] if filled else []

    def asked_by(self, batch: Batch, demand: dict[str, Demand], whole) -> dict[str, AskedRows]:
        """The rows of offloaded tables that a batch asks for.

        Args:
            whole: gives the demand of a batch with all rows listed.
        """
        tables, found = self.tables(batch), {}
        for name in self.offloaded:
            # Lists have room for twice the keys of a device; one owner may be asked for more.
            asked = tables[name].asked_by(demand[name]) or tables[name].asked_by(whole(batch)[name])
            assert asked is not None, "whole lists have every row"
            found[name] = asked
        return found

    def fetch(
        self,
        tables: dict[str, ShardedTable],
        state: TrainState,
        batch: Batch,
        schedule: Schedule,
        slots: dict[str, jax.Array],
    ) -> tuple[dict[str, jax.Array], dict[str, Requests]]:
        """The row blocks that serve all micro-batches of the step, and what was asked for.

        Args:
            slots: where the rows of offloaded tables lie, see `ShardedTable.request`.
        """
        keys, valid = self.keys(batch), batch.segment_ids > 0
        requests = {
            name: table.request(keys[name], valid, slots.get(name))
            for name, table in tables.items()
        }
        rows = {
            name: table.fetch(
                state.tables[name],
                requests[name],
                self._dtype,
                state.updates,
                schedule.tables[name],
            )
            for name, table in tables.items()
        }
        return rows, requests

    def push(
        self,
        tables: dict[str, ShardedTable],
        requests: dict[str, Requests],
        gradients: dict[str, jax.Array],
        after: jax.Array | None,
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Sums of row gradients at the owners, and their norms.

        Rows travel in the compute dtype both ways; owners sum in float32.

        Args:
            after: a scalar or None; see `Exchange.push`.
        """
        with part("row_copies"):
            gradients = {name: g.astype(self._dtype) for name, g in gradients.items()}
        sums = {name: tables[name].push(g, requests[name], after) for name, g in gradients.items()}
        return sums, {name: tables[name].norm(total) for name, total in sums.items()}

    def update(
        self,
        tables: dict[str, ShardedTable],
        requests: dict[str, Requests],
        sums: dict[str, jax.Array],
        norms: dict[str, jax.Array],
        state: TrainState,
        keep: jax.Array,
        schedule: Schedule,
    ) -> tuple[dict[str, TableState], dict[str, jax.Array], dict[str, jax.Array]]:
        """The tables after an update, the rows that some update had, and metrics of these.

        Each memory is clipped by its own norm.

        Args:
            keep: scalar bool; False leaves every row where it is.
        """
        new_tables, touched, metrics = {}, {}, {}
        for name, table in tables.items():
            with part("row_optimizer"):
                factor = clip_factor(norms[name], table.spec.clip_norm)
            new = table.update(
                state.tables[name],
                requests[name],
                sums[name],
                state.updates,
                keep,
                schedule.tables[name],
                factor,
            )
            # Counted as they come: rows in host memory are not here to be counted.
            first_time = table.never_updated(state.tables[name], requests[name])
            touched[name] = state.touched_rows[name] + jnp.where(keep, first_time, 0)
            new_tables[name] = new
            begin, num_keys = prefix(name), table.spec.layout.num_keys
            metrics[f"{begin}_grad_norm"] = norms[name]
            metrics[f"{begin}/never_touched_rows"] = num_keys - touched[name]
        return new_tables, touched, metrics

    def metrics(
        self, tables: dict[str, ShardedTable], requests: dict[str, Requests]
    ) -> dict[str, jax.Array]:
        """What a step asked of the tables."""
        found: dict[str, jax.Array] = {}
        for name, table in tables.items():
            asked = self._asked(table, requests[name])
            found |= {f"{prefix(name)}/{key}": value for key, value in asked.items()}
        return found

    @part("exchange")
    def _asked(self, table: ShardedTable, requests: Requests) -> dict[str, jax.Array]:
        """What a step asked of a table.

        distinct_rows: over all devices. exchange_bytes: sent by a device, there and back, with
        padding. busiest_owner: rows asked of it over the mean of all owners.
        """
        spec, exchange = table.spec, table.exchange
        owned = jnp.sum(requests.owned < spec.num_rows)
        numbers = spec.row_size // self._mesh.shape["tensor"]
        asked_P = requests.asked.astype(jnp.float32)
        return {
            "distinct_rows": owned,
            "exchange_rounds": jnp.int32(exchange.rounds),
            "exchange_bytes": jnp.float32(numbers * exchange.sent_bytes(self._dtype.itemsize)),
            "busiest_owner": jnp.max(asked_P) / jnp.maximum(jnp.mean(asked_P), 1),
        }

    def _known(self, batch: Batch, demand: dict[str, Demand]):
        """What a batch needs, what the first like it needed, and the largest sizes, by memory."""
        tables = self.tables(batch)
        needed = {name: table.needed_by(demand[name]) for name, table in tables.items()}
        sizes = tuple(table.keys_per_device for table in tables.values())
        first = self._first_needs.setdefault(sizes, needed)
        return needed, first, {name: table.largest_sizes for name, table in tables.items()}


def all_finite(values: Iterable[jax.Array], start: jax.Array) -> jax.Array:
    """Whether `start` holds and every scalar is finite."""
    for value in values:
        start = start & jnp.isfinite(value)
    return start
