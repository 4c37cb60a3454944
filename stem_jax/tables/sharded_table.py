"""The table as the train step uses it: request, fetch, push, update, each one sharded program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from stem_jax.kernels.row_sums import spare_rows, way_on
from stem_jax.mesh import BATCH_AXES, axis_size
from stem_jax.parts import part
from stem_jax.tables.exchange import Exchange, Requests
from stem_jax.tables.row_optimizer import RowOptimizer
from stem_jax.tables.spec import TableSpec, TableState
from stem_jax.tables.update_history import UpdateHistory

_SMALLEST_BLOCK = 64
# What one round of the exchange may take to send, and as much to receive, at float32: more rounds
# cost little time, larger buffers cost memory at the peak of a step.
_ROUND_BYTES = 2**28
# Rows that catch up at a time when a whole table does.
_PIECE = 1024


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Static sizes of a step's row blocks: U rows of a device, O rows asked of an owner."""

    unique: int
    owned: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Demand:
    """unique: scalar int32, the most distinct rows that a device needs. tokens_of_row: [V_pad]
    int32, tokens of each row over all devices.
    """

    unique: jax.Array
    tokens_of_row: jax.Array


@dataclasses.dataclass(frozen=True)
class ShardedTable:
    """Methods take and return global arrays and are traced inside the caller's jit.

    Attributes:
        spec: the table.
        mesh: where it lies.
        keys_per_device: keys of one device in one step, padding included.
        sizes: of the row blocks, from `choose_sizes`; None is room for every key distinct.
    """

    spec: TableSpec
    mesh: Mesh
    keys_per_device: int
    sizes: BlockSizes | None = None

    @property
    def largest_sizes(self) -> BlockSizes:
        """Sizes that always suffice: every key distinct, and every device asking one owner."""
        unique = min(self.keys_per_device, self.spec.num_rows)
        shard = self.spec.num_rows // axis_size(self.mesh, self.spec.vocab_axes)
        owned = min(shard, axis_size(self.mesh, BATCH_AXES) * unique)
        return BlockSizes(unique + self._spare, owned)

    @property
    def exchange(self) -> Exchange:
        """The exchange at the sizes of this step."""
        owners = axis_size(self.mesh, self.spec.vocab_axes)
        sizes = self.sizes or self.largest_sizes
        even_share = -(-5 * sizes.unique // (4 * owners))
        row_bytes = 4 * self.spec.num_layers * self.spec.width // self.mesh.shape["tensor"]
        small = max(1, _ROUND_BYTES // (owners * row_bytes))
        return Exchange(
            num_rows=self.spec.num_rows,
            vocab_axes=self.spec.vocab_axes,
            num_owners=owners,
            unique_rows=sizes.unique,
            owned_rows=sizes.owned,
            capacity=min(self.spec.capacity or min(even_share, small), sizes.unique),
        )

    def demand(self, keys_AxBxL: jax.Array, valid_AxBxL: jax.Array) -> Demand:
        """What a step asks of the table, the same on every device."""
        num_rows, room = self.spec.num_rows, self.largest_sizes.unique

        def local(keys, valid):
            rows = self._rows_of(keys, valid)
            distinct_U, tokens_U = jnp.unique(
                rows, size=room, fill_value=num_rows, return_counts=True
            )
            tokens_V = jnp.zeros(num_rows, jnp.int32).at[distinct_U].set(tokens_U, mode="drop")
            unique = jax.lax.pmax(jnp.sum(distinct_U < num_rows), BATCH_AXES)
            return Demand(unique, jax.lax.psum(tokens_V, BATCH_AXES))

        keys_spec, whole = PartitionSpec(None, BATCH_AXES), PartitionSpec()
        return self._sharded(local, (keys_spec, keys_spec), Demand(whole, whole))(
            keys_AxBxL, valid_AxBxL
        )

    def sizes_for(self, demand: Demand) -> BlockSizes:
        """The sizes for a demand that has come to the host."""
        owners = axis_size(self.mesh, self.spec.vocab_axes)
        asked_PxN = np.asarray(demand.tokens_of_row).reshape(owners, -1)
        owned = np.count_nonzero(asked_PxN, axis=1).max()
        return self.choose_sizes((int(demand.unique), int(owned)))

    def choose_sizes(self, counts: tuple[int, int]) -> BlockSizes:
        """The smallest powers of two that hold U rows of a device and O rows asked of an owner.

        A function of the batch alone: a size that depended on earlier batches would change the
        order of sums, and with it the bits of a resumed run.
        """
        largest = self.largest_sizes
        counts = (counts[0] + self._spare, counts[1])
        unique, owned = (max(_SMALLEST_BLOCK, 1 << (int(n) - 1).bit_length()) for n in counts)
        return BlockSizes(min(unique, largest.unique), min(owned, largest.owned))

    @property
    def request_specs(self) -> Requests:
        """Partition of each field of `Requests`."""
        batch, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
        return Requests(
            rows=batch,
            inverse=PartitionSpec(None, BATCH_AXES),
            order=PartitionSpec(None, BATCH_AXES),
            owned=self.spec.index_spec,
            rounds=whole,
            distinct=batch,
            asked=whole,
            slots=self.spec.index_spec if self.spec.offloaded else None,
        )

    @property
    def block_spec(self) -> PartitionSpec:
        """Partition of row blocks [devices * U, S, F]."""
        return PartitionSpec(BATCH_AXES, None, "tensor")

    @part("exchange")
    def request(
        self, keys_AxBxL: jax.Array, valid_AxBxL: jax.Array, slots: jax.Array | None = None
    ) -> Requests:
        """Distinct rows of a whole step, all its micro-batches together.

        Args:
            keys_AxBxL: int32 keys, B over the batch axes.
            valid_AxBxL: bool; padding asks for no row and sends no gradient.
            slots: [owners * O] int32, where an offloaded table's rows lie, in the order in which
                the owners are asked for them.
        """

        def local(keys, valid, slots):
            found = self.exchange.request(self._rows_of(keys, valid))
            return dataclasses.replace(found, distinct=found.distinct[None], slots=slots)

        keys_spec = PartitionSpec(None, BATCH_AXES)
        specs = (keys_spec, keys_spec, self.request_specs.slots)
        return self._sharded(local, specs, self.request_specs)(keys_AxBxL, valid_AxBxL, slots)

    @part("exchange")
    def fetch(self, state, requests, dtype, step, history: UpdateHistory) -> jax.Array:
        """The row blocks [devices * U, S, F] of all devices in `dtype`, as of update `step`."""

        def local(state, requests, step, history):
            block = self._optimizer.read(state, self._places(requests), step, history)
            return self.exchange.fetch(block.rows.astype(dtype), requests)

        whole = PartitionSpec()
        specs = (self._state_specs, self.request_specs, whole, whole)
        return self._sharded(local, specs, self.block_spec)(state, requests, step, history)

    @part("exchange")
    def push(self, gradient: jax.Array, requests: Requests) -> jax.Array:
        """Sums row gradients [devices * U, S, F] at the owners: [owners * O, S, F] float32."""
        return self._sharded(
            self.exchange.push, (self.block_spec, self.request_specs), self.spec.row_spec
        )(gradient, requests)

    @part("row_optimizer")
    def update(self, state, requests, gradient, step, keep, history: UpdateHistory) -> TableState:
        """Update `step + 1` from the owners' summed gradients; see `RowOptimizer.update`."""

        def local(state, requests, gradient, step, keep, history):
            places = self._places(requests)
            return self._optimizer.update(state, places, gradient, step, keep, history)

        whole = PartitionSpec()
        specs = (self._state_specs, self.request_specs, self.spec.row_spec, whole, whole, whole)
        return self._sharded(local, specs, self._state_specs)(
            state, requests, gradient, step, keep, history
        )

    def caught_up_rows(self, state: TableState, step, history: UpdateHistory) -> jax.Array:
        """All rows [V_pad, S, F] as of update `step`; the state stays as it is.

        Works through each shard in pieces, so that it needs no second copy of the slots.
        """

        def local(state, step, history):
            size = state.rows.shape[0]
            piece = next(n for n in range(min(_PIECE, size), 0, -1) if size % n == 0)
            pieces = jnp.arange(size).reshape(-1, piece)
            read = functools.partial(self._optimizer.read, state, step=step, history=history)
            return jax.lax.map(lambda rows: read(rows).rows, pieces).reshape(state.rows.shape)

        whole = PartitionSpec()
        return self._sharded(local, (self._state_specs, whole, whole), self.spec.row_spec)(
            state, step, history
        )

    def _rows_of(self, keys, valid) -> jax.Array:
        return jnp.where(valid, self.spec.layout.rows_of(keys), self.spec.num_rows)

    @property
    def _spare(self) -> int:
        return spare_rows(way_on(self.mesh))

    @property
    def _optimizer(self) -> RowOptimizer:
        return RowOptimizer(self.spec)

    @property
    def _state_specs(self) -> TableState:
        rows = self.spec.row_spec
        return TableState(rows, rows, rows, self.spec.index_spec)

    def _places(self, requests: Requests) -> jax.Array:
        """[O] where the asked rows lie in this device's shard; padding lands past its end."""
        if requests.slots is not None:
            return requests.slots
        owned_O, size = requests.owned, self.exchange.rows_per_owner
        axes = self.spec.vocab_axes
        first = jax.lax.axis_index(axes) * size if axes else 0
        return jnp.where(owned_O < self.spec.num_rows, owned_O - first, size)

    def _sharded(self, function, in_specs, out_specs):
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
