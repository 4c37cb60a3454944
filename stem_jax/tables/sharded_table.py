"""The table as the train step uses it: request, fetch, push, update, each one sharded program."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from stem_jax.kernels.row_sums import SORTED, spare_rows, way_on
from stem_jax.mesh import BATCH_AXES, CONTEXT, TOKEN_AXES, axis_size, live_axes
from stem_jax.parts import part
from stem_jax.tables.asked_rows import AskedRows
from stem_jax.tables.block_sizes import BlockSizes, largest_sizes
from stem_jax.tables.exchange import Exchange
from stem_jax.tables.hops import owner_hops
from stem_jax.tables.requests import HopRequests, Requests
from stem_jax.tables.row_optimizer import RowOptimizer
from stem_jax.tables.spec import TableSpec, TableState
from stem_jax.tables.update_history import UpdateHistory

_KEYS = PartitionSpec(None, BATCH_AXES, CONTEXT)
# What a buffer of the exchange may take at float32 whatever the batch; a larger one holds so many
# times the rows of a device. More rounds cost little time, larger buffers memory.
_ROUND_BYTES = 2**28
_PADDING = 1.5
# Numbers of an array of rows that stay on a TPU's chip with the ten like it that an update makes.
_CHIP_NUMBERS = 2**21
# Rows of a tile on TPUs: an owner's rows fill whole tiles.
_SUBLANES = 8
# Rows that catch up at a time when a whole table does.
_PIECE = 1024
# Rows that a norm takes at a time: a reduction is cut into parts by its length, and with room for
# 37 rows or for 512, CPUs give the squares of 37 other sums.
_NORM_PIECE = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Demand:
    """What a batch asks of a table.

    needed: int32, the numbers of `BlockSizes`, the same on every device. rows: [P, N] int32, the
    rows that each owner is asked for, rising, V_pad behind them; N holds twice the keys of a device
    and not always all. tokens: [P, N] int32, of each row over all devices. The last two lie with
    the owners, each its own line, and are None unless the table is offloaded.
    """

    needed: jax.Array
    rows: jax.Array | None
    tokens: jax.Array | None


@dataclasses.dataclass(frozen=True)
class ShardedTable:
    """Methods take and return global arrays and are traced inside the caller's jit.

    Attributes:
        spec: the table.
        mesh: where it lies.
        keys_per_device: keys of one device in one step, padding included.
        sizes: of the row blocks and the exchange, see `block_sizes`; None is room for any batch.
    """

    spec: TableSpec
    mesh: Mesh
    keys_per_device: int
    sizes: BlockSizes | None = None

    @property
    def largest_sizes(self) -> BlockSizes:
        """Sizes that always suffice."""
        owners = axis_size(self.mesh, self.spec.vocab_axes)
        hops = owner_hops(self.mesh, self.spec.vocab_axes)
        copies = axis_size(self.mesh, TOKEN_AXES) // owners
        return largest_sizes(self.keys_per_device, self.spec.num_rows, hops, owners, copies)

    @property
    def exchange(self) -> Exchange:
        """The exchange at the sizes of this step."""
        sizes, way = self.sizes or self.largest_sizes, way_on(self.mesh)
        hops = owner_hops(self.mesh, self.spec.vocab_axes)
        row_bytes = 4 * self.spec.width // self.mesh.shape["tensor"]
        buffer_rows = max(_ROUND_BYTES // row_bytes, math.ceil(_PADDING * sizes.unique), 1)
        if self.spec.capacity:
            buffer_rows = self.spec.capacity * max((hop.peers for hop in hops), default=1)
        return Exchange(
            num_rows=self.spec.num_rows,
            vocab_axes=self.spec.vocab_axes,
            copy_axes=self._copy_axes,
            num_owners=axis_size(self.mesh, self.spec.vocab_axes),
            hops=hops,
            unique_rows=sizes.unique + spare_rows(way),
            owned_rows=-(-sizes.owned // _SUBLANES) * _SUBLANES,
            capacities=sizes.pairs,
            relayed=sizes.relayed,
            buffer_rows=buffer_rows,
            way=way,
        )

    def demand(self, keys_AxBxL: jax.Array, valid_AxBxL: jax.Array, *, whole=False) -> Demand:
        """What a step asks of the table, found with room for any batch.

        Args:
            whole: list all rows of every owner, however many; see `Demand`.
        """
        largest = self.largest_sizes
        exchange = dataclasses.replace(self, sizes=None).exchange
        copies = axis_size(self.mesh, TOKEN_AXES) // exchange.num_owners
        size = largest.owned if whole else min(largest.owned, 2 * copies * self.keys_per_device)

        def local(keys, valid):
            requests, found = exchange.find(self._rows_of(keys, valid))
            needed = (found.unique, found.owned, *found.pairs, *found.relayed)
            needed = jax.lax.pmax(jnp.stack(needed).astype(jnp.int32), TOKEN_AXES)
            if not self.spec.offloaded:
                return Demand(needed, None, None)
            assert found.tokens is not None
            return Demand(needed, requests.owned[None, :size], found.tokens[None, :size])

        keys_spec = _KEYS
        # A demand with partitions for arrays.
        replicated: Any = PartitionSpec()
        lists_spec: Any = PartitionSpec(*self.spec.index_spec, None)
        lists_spec = lists_spec if self.spec.offloaded else None
        specs = Demand(replicated, lists_spec, lists_spec)
        return self._sharded(local, (keys_spec, keys_spec), specs)(keys_AxBxL, valid_AxBxL)

    def needed_by(self, demand: Demand) -> BlockSizes:
        """The needs of a batch whose demand has come to the host."""
        return self.largest_sizes.with_numbers([int(n) for n in np.asarray(demand.needed)])

    def asked_by(self, demand: Demand) -> AskedRows | None:
        """The rows of a batch whose demand has come to the host; None if not all are listed.

        Of the owners that this process holds alone: others' lists are not here.
        """
        assert demand.rows is not None and demand.tokens is not None, "the table is offloaded"
        owners, room = demand.rows.shape
        most = self.needed_by(demand).owned
        if most > room:
            return None
        rows, tokens = _lines(demand.rows), _lines(demand.tokens)
        size, found = self.spec.num_rows // owners, {}
        for owner, line in rows.items():
            asked = line[: np.searchsorted(line, self.spec.num_rows)]
            found[owner] = asked - owner * size, tokens[owner][: len(asked)]
        return AskedRows.of(found, owners, most)

    @property
    def request_specs(self) -> Requests:
        """Partition of each field of `Requests`."""
        # Requests with partitions for arrays.
        each: Any = PartitionSpec(TOKEN_AXES)
        keys: Any = _KEYS
        order: Any = PartitionSpec(None, TOKEN_AXES)
        index: Any = self.spec.index_spec
        hops = self.exchange.hops
        return Requests(
            rows=each,
            inverse=keys,
            order=order,
            owned=index,
            home=each if self._copy_axes and not hops else None,
            hops=tuple(HopRequests(*(each,) * 4) for _ in hops),
            distinct=each,
            asked=index,
            slots=index if self.spec.offloaded else None,
        )

    @property
    def block_spec(self) -> PartitionSpec:
        """Partition of row blocks [S, devices * U, F]."""
        return PartitionSpec(None, TOKEN_AXES, "tensor")

    @part("exchange")
    def request(
        self, keys_AxBxL: jax.Array, valid_AxBxL: jax.Array, slots: jax.Array | None = None
    ) -> Requests:
        """Distinct rows of a whole step, all its micro-batches together.

        Args:
            keys_AxBxL: int32 keys, B over the batch axes and L over context; or [A, B, L, K], of
                several for a token.
            valid_AxBxL: bool; padding asks for no row and sends no gradient.
            slots: [owners * O] int32, where an offloaded table's rows lie, in the order in which
                the owners are asked for them.
        """

        def local(keys, valid, slots):
            found = self.exchange.request(self._rows_of(keys, valid))
            numbers = {"distinct": found.distinct[None], "asked": found.asked[None]}
            return dataclasses.replace(found, **numbers, slots=slots)

        specs = (_KEYS, _KEYS, self.request_specs.slots)
        return self._sharded(local, specs, self.request_specs)(keys_AxBxL, valid_AxBxL, slots)

    @part("exchange")
    def fetch(self, state, requests, dtype, step, history: UpdateHistory) -> jax.Array:
        """The row blocks [S, devices * U, F] of all devices in `dtype`, as of update `step`."""

        def local(state, requests, step, history):
            places = self._places(requests)
            rows = self._optimizer.read_as(state, places, step, history, dtype)
            return self.exchange.fetch(rows, requests)

        whole = PartitionSpec()
        specs = (self._state_specs, self.request_specs, whole, whole)
        return self._sharded(local, specs, self.block_spec)(state, requests, step, history)

    @part("exchange")
    def push(
        self, gradient: jax.Array, requests: Requests, after: jax.Array | None = None
    ) -> jax.Array:
        """Sums row gradients [S, devices * U, F] at the owners: [S, owners * O, F] float32.

        Those of rows that stay as they are, see `TableSpec.trained_keys`, are zero.

        Args:
            after: a scalar; see `Exchange.push`.
        """

        def local(gradient, requests, after):
            sums = self.exchange.push(gradient, requests, after)
            trained_O = self._trained(requests)
            return sums if trained_O is None else jnp.where(trained_O[:, None], sums, 0)

        specs = (self.block_spec, self.request_specs, PartitionSpec())
        return self._sharded(local, specs, self.spec.row_spec)(gradient, requests, after)

    @part("row_optimizer")
    def norm(self, gradient: jax.Array) -> jax.Array:
        """Euclidean norm of what `push` gives, float32; no bit depends on the room behind rows."""

        def local(gradient):
            total = _sum_in_pieces(_squares_by_row(gradient))
            return jax.lax.psum(total, (*self.spec.vocab_axes, "tensor"))

        return jnp.sqrt(self._sharded(local, (self.spec.row_spec,), PartitionSpec())(gradient))

    @part("row_optimizer")
    def update(
        self, state, requests, gradient, step, keep, history: UpdateHistory, scale=1.0
    ) -> TableState:
        """Update `step + 1` from the owners' summed gradients; see `RowOptimizer.update`."""

        def local(state, requests, *arguments):
            places = self._places_to_write(requests)
            return self._optimizer.update(state, places, *arguments, numbers_O=requests.owned)

        whole, sums = PartitionSpec(), self.spec.row_spec
        specs = (self._state_specs, self.request_specs, sums, *(whole,) * 4)
        return self._sharded(local, specs, self._state_specs)(
            state, requests, gradient, step, keep, history, jnp.float32(scale)
        )

    @part("row_optimizer")
    def never_updated(self, state: TableState, requests: Requests) -> jax.Array:
        """Scalar int32, how many of the asked rows that train no update has had.

        Looks at these alone.
        """

        def local(state, requests):
            places, size = self._places_to_write(requests), state.last_step.shape[0]
            last_O = state.last_step[jnp.minimum(places, size - 1)]
            found = jnp.sum((places < size) & (last_O == 0), dtype=jnp.int32)
            return jax.lax.psum(found, self.spec.vocab_axes)

        specs = (self._state_specs, self.request_specs)
        return self._sharded(local, specs, PartitionSpec())(state, requests)

    def caught_up_rows(
        self, state: TableState, step, history: UpdateHistory, dtype="float32"
    ) -> jax.Array:
        """All rows as of update `step`, stored: [S, V_pad, F]; of the state, its rows are taken.

        Works through each shard in pieces, so that where the rows are donated, and have the dtype
        already, it needs no second copy of any of them.
        """

        def local(state, step, history):
            in_place = state.rows.dtype == dtype
            begun = state.rows if in_place else jax.lax.empty(state.rows.shape, dtype)
            size = state.rows.shape[1]
            piece = next(n for n in range(min(_PIECE, size), 0, -1) if size % n == 0)

            def one_piece(first, found):
                # Of rows that are behind, pieces that have not been found yet.
                behind = dataclasses.replace(state, rows=found) if in_place else state
                places = first + jnp.arange(piece)
                rows = self._optimizer.read(behind, places, step=step, history=history).rows
                rows = rows.astype(dtype)
                return jax.lax.dynamic_update_slice_in_dim(found, rows, first, axis=1)

            return jax.lax.fori_loop(
                0, size // piece, lambda n, found: one_piece(n * piece, found), begun
            )

        whole = PartitionSpec()
        return self._sharded(local, (self._state_specs, whole, whole), self.spec.row_spec)(
            state, step, history
        )

    def _rows_of(self, keys, valid) -> jax.Array:
        # All keys of a token are valid, or none.
        valid = valid.reshape(*valid.shape, *(1,) * (keys.ndim - valid.ndim))
        return jnp.where(valid, self.spec.layout.rows_of(keys), self.spec.num_rows)

    @property
    def _copy_axes(self) -> tuple[str, ...]:
        others = (axis for axis in TOKEN_AXES if axis not in self.spec.vocab_axes)
        return live_axes(self.mesh, *others)

    @property
    def _optimizer(self) -> RowOptimizer:
        columns = self.mesh.shape["tensor"]
        if way_on(self.mesh) not in SORTED:
            return RowOptimizer(self.spec, column_shards=columns)
        width = self.spec.width // columns
        tiles = max(1, _CHIP_NUMBERS // width // _SUBLANES)
        passes = way_on(self.mesh) == "blocks"
        return RowOptimizer(
            self.spec, piece=tiles * _SUBLANES, passes=passes, column_shards=columns
        )

    @property
    def _state_specs(self) -> TableState:
        partitions: dict[str, Any] = {f.name: self.spec.partition(f.name) for f in self.spec.fields}
        return TableState(**partitions)

    def _places(self, requests: Requests) -> jax.Array:
        """[O] where the asked rows lie in this device's shard; padding lands past its end."""
        if requests.slots is not None:
            return requests.slots
        owned_O, size = requests.owned, self.exchange.rows_per_owner
        axes = self.spec.vocab_axes
        first = jax.lax.axis_index(axes) * size if axes else 0
        return jnp.where(owned_O < self.spec.num_rows, owned_O - first, size)

    def _places_to_write(self, requests: Requests) -> jax.Array:
        """The same, where rows that stay as they are land past its end, too."""
        places_O, trained_O = self._places(requests), self._trained(requests)
        # No shard, and no number of slots, is larger.
        return places_O if trained_O is None else jnp.where(trained_O, places_O, self.spec.num_rows)

    def _trained(self, requests: Requests) -> jax.Array | None:
        """[O] bool, which of the asked rows an update changes; None: all."""
        keys = self.spec.trained_keys
        if keys is None:
            return None
        rows_T = jnp.asarray(np.sort(self.spec.layout.row_numbers(np.array(keys))), jnp.int32)
        found_O = jnp.minimum(jnp.searchsorted(rows_T, requests.owned), len(keys) - 1)
        return rows_T[found_O] == requests.owned

    def _sharded(self, function, in_specs, out_specs):
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )


def _lines(array_PxN: jax.Array) -> dict[int, np.ndarray]:
    """[N] by owner, of those that this process holds."""
    shards = {shard.index[0].start or 0: shard.data for shard in array_PxN.addressable_shards}
    lines = {owner: np.asarray(shards[owner]) for owner in sorted(shards)}
    return {owner: line for owner, [line] in lines.items()}


def _squares_by_row(rows_SxOxF: jax.Array) -> jax.Array:
    """Sums of squares [O] of each row, by a program that does not know how many there are.

    CPUs sum the last few rows of an array in another order than those before.
    """
    number = rows_SxOxF.shape[1]
    size = max(number, _NORM_PIECE)
    rows_SxNxF = jnp.pad(rows_SxOxF, ((0, 0), (0, size - number), (0, 0)))

    def one_piece(piece, found_O):
        # The last may overlap the one before; it finds the same.
        first = jnp.minimum(piece * _NORM_PIECE, size - _NORM_PIECE)
        rows = jax.lax.dynamic_slice_in_dim(rows_SxNxF, first, _NORM_PIECE, axis=1)
        sums = jnp.sum(jnp.square(rows), axis=(0, 2))
        return jax.lax.dynamic_update_slice_in_dim(found_O, sums, first, 0)

    empty = jnp.zeros(size)
    return jax.lax.fori_loop(0, -(-size // _NORM_PIECE), one_piece, empty)[:number]


def _sum_in_pieces(values_O: jax.Array) -> jax.Array:
    """Their sum in an order that more zeros behind them leave as it is."""
    pieces = jnp.pad(values_O, (0, -len(values_O) % _NORM_PIECE)).reshape(-1, _NORM_PIECE)
    total, _ = jax.lax.scan(lambda sums, more: (sums + more, None), jnp.zeros(_NORM_PIECE), pieces)
    # Alone, so that it is one program whatever made its pieces.
    return jnp.sum(jax.lax.optimization_barrier(total))
