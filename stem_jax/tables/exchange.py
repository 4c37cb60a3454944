"""Distinct rows travel once: from their owners to the devices that need them, and sums back.

A device finds the distinct rows of its tokens, sorts them, and so groups them by owner (a shard
owns a contiguous block of rows). Requests, rows and gradients then move in padded all-to-alls of at
most `capacity` rows per pair of devices, repeated in rounds while any pair has more: the capacity
sets speed, never correctness. Everything here runs inside `jax.shard_map`; `Requests` is what one
device knows.

Example: 8 rows on 2 owners, this device's tokens have rows 5 1 5 6. Its distinct rows are 1 5 6,
one asked of owner 0 and two of owner 1; with capacity 1 that takes two rounds.
"""

import dataclasses

import jax
import jax.numpy as jnp

from stem_jax.kernels.row_sums import RowOrder, dense_order, order_of
from stem_jax.mesh import BATCH_AXES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Requests:
    """Which rows a device needs and which rows it is asked for.

    rows: [U] int32, sorted distinct rows of this device's keys; V_pad fills the rest.
    inverse: index of each key's row in `rows`, shape of the keys.
    order: of `inverse`, one for each micro-batch, arrays [A, M].
    owned: [O] int32, sorted distinct rows that this device is asked for, all of its own shard;
        V_pad fills the rest.
    rounds: scalar int32, the same on every device.
    distinct: scalar int32, number of distinct rows in `rows`.
    asked: [P] int32, rows asked of each owner by all devices together.
    slots: [O] int32, where the owner's device holds the rows of `owned`; past the end for what
        fills the rest. None if all rows are resident, each at its own place.
    """

    rows: jax.Array
    inverse: jax.Array
    order: RowOrder
    owned: jax.Array
    rounds: jax.Array
    distinct: jax.Array
    asked: jax.Array
    slots: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The sizes of an exchange; its methods run on every device inside `shard_map`.

    Attributes:
        num_rows: V_pad.
        vocab_axes: mesh axes that shard the rows; the other batch axes hold copies.
        num_owners: P, devices along `vocab_axes`.
        unique_rows: U, room for the distinct rows of a device.
        owned_rows: O, room for the distinct rows that an owner is asked for.
        capacity: rows per pair of devices and round.
    """

    num_rows: int
    vocab_axes: tuple[str, ...]
    num_owners: int
    unique_rows: int
    owned_rows: int
    capacity: int

    @property
    def rows_per_owner(self) -> int:
        """Rows of one shard."""
        return self.num_rows // self.num_owners

    def request(self, rows: jax.Array) -> Requests:
        """Finds the distinct rows of this device and tells their owners.

        Args:
            rows: [A, ...] int32 of A micro-batches; V_pad marks padding, which asks for nothing.
        """
        distinct_U, inverse, order = self._sorted(rows)
        counts_P = jnp.diff(self._starts(distinct_U))
        rounds = jax.lax.pmax(-(-jnp.max(counts_P) // self.capacity), BATCH_AXES)
        owned_O = jnp.full(self.owned_rows, self.num_rows, jnp.int32)

        def collect(state):
            step, owned_O = state
            asked_PxC = self._swap(self._ask(distinct_U, step))
            owned_O = self._distinct(jnp.concatenate([owned_O, asked_PxC.reshape(-1)]))
            return step + 1, owned_O

        if self.num_owners == 1:
            owned_O = self._distinct(distinct_U)
        else:
            _, owned_O = jax.lax.while_loop(lambda s: s[0] < rounds, collect, (0, owned_O))
        for axis in self._copy_axes():
            owned_O = self._distinct(jax.lax.all_gather(owned_O, axis, tiled=True))
        number = jnp.sum(distinct_U < self.num_rows)
        asked_P = jax.lax.psum(counts_P, BATCH_AXES)
        return Requests(distinct_U, inverse, order, owned_O, rounds, number, asked_P)

    def fetch(self, block_OxSxF: jax.Array, requests: Requests) -> jax.Array:
        """Brings the rows of every device from their owners.

        Args:
            block_OxSxF: this owner's rows, in the order of `requests.owned`.

        Returns:
            [U, S, F] rows in the order of `requests.rows`; what pads the end is zero.
        """
        wanted_U, row_shape = requests.rows, block_OxSxF.shape[1:]
        # Flat rows: TPUs pad the last two dimensions to tiles, and S is small.
        block_OxW = block_OxSxF.reshape(self.owned_rows, -1)
        if self.num_owners == 1:
            taken = block_OxW[self._position(requests.owned, wanted_U)]
            return jnp.where((wanted_U < self.num_rows)[:, None], taken, 0).reshape(-1, *row_shape)
        starts = self._starts(wanted_U)
        owner_U = jnp.minimum(wanted_U // self.rows_per_owner, self.num_owners - 1)
        rank_U = jnp.arange(self.unique_rows) - starts[owner_U]

        def one_round(state):
            step, fetched_UxW = state
            asked_PxC = self._swap(self._ask(wanted_U, step))
            answers = block_OxW[self._position(requests.owned, asked_PxC)]
            arrived = self._swap(answers).reshape(-1, block_OxW.shape[1])
            column_U = rank_U - step * self.capacity
            here_U = (column_U >= 0) & (column_U < self.capacity) & (wanted_U < self.num_rows)
            place_U = jnp.where(here_U, owner_U * self.capacity + column_U, 0)
            return step + 1, jnp.where(here_U[:, None], arrived[place_U], fetched_UxW)

        empty = jnp.zeros((self.unique_rows, block_OxW.shape[1]), block_OxW.dtype)
        fetched = jax.lax.while_loop(lambda s: s[0] < requests.rounds, one_round, (0, empty))[1]
        return fetched.reshape(-1, *row_shape)

    def push(self, gradient_UxSxF: jax.Array, requests: Requests) -> jax.Array:
        """Sends row gradients to the owners, who sum them in float32, source by source.

        Returns:
            [O, S, F] float32 sums in the order of `requests.owned`.
        """
        row_shape = gradient_UxSxF.shape[1:]
        gradient_UxW = gradient_UxSxF.reshape(self.unique_rows, -1)
        sums_OxW = jnp.zeros((self.owned_rows, gradient_UxW.shape[1]), jnp.float32)
        if self.num_owners == 1:
            sums_OxW = self._add(sums_OxW, requests, requests.rows, gradient_UxW)
        else:
            sums_OxW = self._push_rounds(sums_OxW, gradient_UxW, requests)
        axes = self._copy_axes()
        sums_OxW = jax.lax.psum(sums_OxW, axes) if axes else sums_OxW
        return sums_OxW.reshape(-1, *row_shape)

    def _push_rounds(self, sums_OxW, gradient_UxW, requests: Requests):
        starts = self._starts(requests.rows)

        def one_round(state):
            step, sums = state
            mine_PxC = self._ask(requests.rows, step)
            place_PxC = jnp.minimum(self._places(starts, step), self.unique_rows - 1)
            sent = jnp.where((mine_PxC < self.num_rows)[..., None], gradient_UxW[place_PxC], 0)
            asked_PxC, arrived = self._swap(mine_PxC), self._swap(sent)

            # Rows are distinct within one source, so no scatter ever meets an index twice.
            def one_source(source, sums):
                return self._add(sums, requests, asked_PxC[source], arrived[source])

            return step + 1, jax.lax.fori_loop(0, self.num_owners, one_source, sums)

        return jax.lax.while_loop(lambda s: s[0] < requests.rounds, one_round, (0, sums_OxW))[1]

    def _add(self, sums_OxW, requests: Requests, rows_C, values_CxW):
        place_C = self._position(requests.owned, rows_C)
        place_C = jnp.where(rows_C < self.num_rows, place_C, self.owned_rows)
        return sums_OxW.at[place_C].add(values_CxW.astype(jnp.float32), mode="drop")

    def _sorted(self, rows: jax.Array) -> tuple[jax.Array, jax.Array, RowOrder]:
        """The distinct rows [U], the index of each key's row among them, and the index's order.

        One sort serves all of it; with several micro-batches each needs an order of its own.
        """
        flat_N = rows.reshape(-1)
        positions_N = jnp.argsort(flat_N)
        sorted_N = flat_N[positions_N]
        starts_N = jnp.concatenate([jnp.ones(1, bool), sorted_N[1:] != sorted_N[:-1]])
        ranks_N = jnp.cumsum(starts_N, dtype=jnp.int32) - 1
        place_N = jnp.where(starts_N, ranks_N, self.unique_rows)
        distinct_U = jnp.full(self.unique_rows, self.num_rows, jnp.int32)
        distinct_U = distinct_U.at[place_N].set(sorted_N, mode="drop", unique_indices=True)
        # Padding sorts last and may fall off the end; its gradient is zero, any row serves it.
        ranks_N = jnp.minimum(ranks_N, self.unique_rows - 1)
        inverse_N = jnp.zeros_like(ranks_N).at[positions_N].set(ranks_N, unique_indices=True)
        inverse = inverse_N.reshape(rows.shape)
        if rows.shape[0] == 1:
            order = jax.tree.map(lambda x: x[None], dense_order(positions_N, ranks_N))
        else:
            order = jax.vmap(lambda index: order_of(index, self.unique_rows))(inverse)
        return distinct_U, inverse, order

    def _copy_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis in BATCH_AXES if axis not in self.vocab_axes)

    def _distinct(self, rows: jax.Array) -> jax.Array:
        found = jnp.unique(rows, size=self.owned_rows, fill_value=self.num_rows)
        return found.astype(jnp.int32)

    def _position(self, owned_O: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.minimum(jnp.searchsorted(owned_O, rows), self.owned_rows - 1)

    def _starts(self, rows_U: jax.Array) -> jax.Array:
        """[P + 1]: where each owner's rows start in the sorted rows, and where the last end."""
        bounds = jnp.arange(self.num_owners + 1, dtype=jnp.int32) * self.rows_per_owner
        return jnp.searchsorted(rows_U, bounds)

    def _places(self, starts, step) -> jax.Array:
        """[P, C]: which of the sorted rows each owner is asked for in this round."""
        return starts[:-1, None] + step * self.capacity + jnp.arange(self.capacity)

    def _ask(self, rows_U: jax.Array, step) -> jax.Array:
        """[P, C]: the rows asked of each owner in this round, V_pad where there are fewer."""
        starts = self._starts(rows_U)
        places = self._places(starts, step)
        asked = rows_U[jnp.minimum(places, self.unique_rows - 1)]
        return jnp.where(places < starts[1:, None], asked, self.num_rows)

    def _swap(self, blocks_PxC: jax.Array) -> jax.Array:
        """Sends block p to owner p; what comes back has the sources in order."""
        return jax.lax.all_to_all(blocks_PxC, self.vocab_axes, 0, 0, tiled=True)
