"""The table as the train step uses it: request, fetch, push, update, each one sharded program."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from stem_jax.mesh import BATCH_AXES, axis_size
from stem_jax.tables.exchange import Exchange, Requests
from stem_jax.tables.row_optimizer import make_row_optimizer
from stem_jax.tables.spec import TableSpec, TableState


@dataclasses.dataclass(frozen=True)
class ShardedTable:
    """Methods take and return global arrays and are traced inside the caller's jit.

    Attributes:
        spec: the table.
        mesh: where it lies.
        keys_per_device: keys of one device in one step, padding included.
    """

    spec: TableSpec
    mesh: Mesh
    keys_per_device: int

    @property
    def exchange(self) -> Exchange:
        """Sizes that always suffice: every key distinct."""
        owners = axis_size(self.mesh, self.spec.vocab_axes)
        unique = min(self.keys_per_device, self.spec.num_rows)
        devices = axis_size(self.mesh, BATCH_AXES)
        even_share = -(-5 * unique // (4 * owners))
        return Exchange(
            num_rows=self.spec.num_rows,
            vocab_axes=self.spec.vocab_axes,
            num_owners=owners,
            unique_rows=unique,
            owned_rows=min(self.spec.num_rows // owners, devices * unique),
            capacity=min(self.spec.capacity or even_share, unique),
        )

    @property
    def request_specs(self) -> Requests:
        """Partition of each field of `Requests`."""
        batch = PartitionSpec(BATCH_AXES)
        return Requests(
            batch, PartitionSpec(None, BATCH_AXES), self.spec.index_spec, PartitionSpec(), batch
        )

    @property
    def block_spec(self) -> PartitionSpec:
        """Partition of row blocks [devices * U, S, F]."""
        return PartitionSpec(BATCH_AXES, None, "tensor")

    def request(self, keys_AxBxL: jax.Array, valid_AxBxL: jax.Array) -> Requests:
        """Distinct rows of a whole step, all its micro-batches together.

        Args:
            keys_AxBxL: int32 keys, B over the batch axes.
            valid_AxBxL: bool; padding asks for no row and sends no gradient.
        """

        def local(keys, valid):
            rows = jnp.where(valid, self.spec.layout.rows_of(keys), self.spec.num_rows)
            found = self.exchange.request(rows)
            return dataclasses.replace(found, distinct=found.distinct[None])

        keys_spec = PartitionSpec(None, BATCH_AXES)
        return self._sharded(local, (keys_spec, keys_spec), self.request_specs)(
            keys_AxBxL, valid_AxBxL
        )

    def fetch(self, state: TableState, requests: Requests, dtype) -> jax.Array:
        """The row blocks [devices * U, S, F] of all devices, in `dtype`."""

        def local(state, requests):
            rows_OxSxF = self._optimizer.read(state, self._local(requests.owned))
            return self.exchange.fetch(rows_OxSxF.astype(dtype), requests)

        return self._sharded(local, (self._state_specs, self.request_specs), self.block_spec)(
            state, requests
        )

    def push(self, gradient: jax.Array, requests: Requests) -> jax.Array:
        """Sums row gradients [devices * U, S, F] at the owners: [owners * O, S, F] float32."""
        return self._sharded(
            self.exchange.push, (self.block_spec, self.request_specs), self.spec.row_spec
        )(gradient, requests)

    def update(self, state, requests, gradient, learning_rates, step, keep) -> TableState:
        """One optimizer update from the owners' summed gradients; see `row_optimizer`."""

        def local(state, requests, gradient, learning_rates, step, keep):
            rows = self._local(requests.owned)
            return self._optimizer.update(state, rows, gradient, learning_rates, step, keep)

        scalar = PartitionSpec()
        specs = (self._state_specs, self.request_specs, self.spec.row_spec, scalar, scalar, scalar)
        return self._sharded(local, specs, self._state_specs)(
            state, requests, gradient, learning_rates, step, keep
        )

    @property
    def _optimizer(self):
        return make_row_optimizer(self.spec)

    @property
    def _state_specs(self) -> TableState:
        rows = self.spec.row_spec
        return TableState(rows, rows, rows, self.spec.index_spec)

    def _local(self, owned_O: jax.Array) -> jax.Array:
        """Row numbers within this device's shard; padding lands past its end."""
        size = self.exchange.rows_per_owner
        axes = self.spec.vocab_axes
        first = jax.lax.axis_index(axes) * size if axes else 0
        return jnp.where(owned_O < self.spec.num_rows, owned_O - first, size)

    def _sharded(self, function, in_specs, out_specs):
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
