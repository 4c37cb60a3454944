"""Distinct rows travel once: from their owners to the devices that need them, and sums back.

A device finds the distinct rows of its tokens and asks their owners for them, hop by hop (see
`hops`): each relay asks on for the distinct rows that it is asked for. What every hop sends where,
and which of its rows each arrived request names, is found once and recorded; rows come back along
it, and gradients go out along it, summed at every relay in float32 by row and, for one row, by
source. Everything here runs inside `jax.shard_map`; `Requests` is what one device knows.

All sizes are static: room for a pair of devices in a hop, and for the rows of a relay. They must
hold what the batch needs, and sums do not depend on them. Where they need more than a buffer may
take, as in a batch whose keys all have one owner, columns travel part by part: rounds.

Example: 8 rows on 2 owners, this device's tokens have rows 5 1 5 6. Its distinct rows are 1 5 6,
one asked of owner 0 and two of owner 1, so the hop needs room for two rows of a pair.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from stem_jax.kernels.row_sums import (
    SORTED,
    RowOrder,
    dense_order,
    order_of,
    spare_rows,
    sum_by_row,
)
from stem_jax.tables.hops import Hop
from stem_jax.tables.requests import Found, HopRequests, Requests
from stem_jax.tables.row_lists import of_vector, resized, slots_of, taken, whole_sums

# Rows that are put in their places at a time, few enough for the fast memory of a TPU: gathered
# all at once, they go to its main memory and are read from there to be written again.
_PIECE = 512


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The sizes of an exchange; its methods run on every device inside `shard_map`.

    Attributes:
        num_rows: V_pad.
        vocab_axes: mesh axes that shard the rows.
        copy_axes: those along which other devices have copies of this owner's rows.
        num_owners: P, devices along `vocab_axes`.
        hops: from a device to an owner.
        unique_rows: U, room for the distinct rows of a device.
        owned_rows: O, room for the distinct rows that an owner is asked for.
        capacities: of each hop, room for the rows of a pair.
        relayed: after each hop but the last, room for the distinct rows of a relay.
        buffer_rows: rows of full width that a buffer may take.
        way: how rows are summed, see `row_sums`.
    """

    num_rows: int
    vocab_axes: tuple[str, ...]
    copy_axes: tuple[str, ...]
    num_owners: int
    hops: tuple[Hop, ...]
    unique_rows: int
    owned_rows: int
    capacities: tuple[int, ...]
    relayed: tuple[int, ...]
    buffer_rows: int
    way: str

    @property
    def rows_per_owner(self) -> int:
        """Rows of one shard."""
        return self.num_rows // self.num_owners

    @property
    def _rooms(self) -> tuple[int, ...]:
        """Room for the distinct rows that arrive by each hop."""
        return (*self.relayed, self.owned_rows)[: len(self.hops)]

    @property
    def slots(self) -> tuple[int, ...]:
        """Rows that a device sends in each hop, padding included."""
        pairs = zip(self.hops, self.capacities, strict=True)
        return tuple(hop.peers * capacity for hop, capacity in pairs)

    @property
    def rounds(self) -> int:
        """Parts of the columns that travel one after the other, so that buffers stay small."""
        return max(1, -(-max((*self.slots, *self.relayed), default=0) // self.buffer_rows))

    def buffer_bytes(self, row_bytes: int) -> int:
        """Bytes of the largest padded buffer, of rows of these bytes."""
        return -(-max(self.slots, default=0) * row_bytes // self.rounds)

    def sent_bytes(self, itemsize: int) -> int:
        """Bytes that a device sends to others for each column of its rows, there and back.

        Args:
            itemsize: of the rows; relays send their sums on in float32.
        """
        others = [n - n // hop.peers for hop, n in zip(self.hops, self.slots, strict=True)]
        return sum(others) * itemsize + sum(others[:1]) * itemsize + 4 * sum(others[1:])

    def request(self, rows: jax.Array) -> Requests:
        """Finds the distinct rows of this device and tells their owners.

        Args:
            rows: [A, ...] int32 of A micro-batches; V_pad marks padding, which asks for nothing.
        """
        return self._search(rows, counted=False)[0]

    def find(self, rows: jax.Array) -> tuple[Requests, Found]:
        """`request` and what it needs room for, if these sizes hold it."""
        return self._search(rows, counted=True)

    def fetch(self, block_SxOxF: jax.Array, requests: Requests) -> jax.Array:
        """Brings rows to every device from their owners.

        Args:
            block_SxOxF: this owner's rows, in the order of `requests.owned`.

        Returns:
            [S, U, F] rows in the order of `requests.rows`; what pads the end is zero.
        """
        if self.hops:

            def bring(rows_SxOxW, vector, whole, corner):
                rows, pick_U = self._fetch(rows_SxOxW[vector], requests)
                return self._put_picked(whole, corner, rows, pick_U, requests)

            return self._by_vector(bring, block_SxOxF, self.unique_rows, block_SxOxF.dtype)
        if requests.home is None:
            fetched_SxUxF = resized(block_SxOxF, self.unique_rows, axis=1)
        else:
            fetched_SxUxF = block_SxOxF[:, jnp.minimum(requests.home, self.owned_rows - 1)]
        return jnp.where((requests.rows < self.num_rows)[:, None], fetched_SxUxF, 0)

    def push(
        self, gradient_SxUxF: jax.Array, requests: Requests, after: jax.Array | None = None
    ) -> jax.Array:
        """Sends row gradients to the owners.

        They set out in the dtype they have, and travel on from a relay as its float32 sums.

        Args:
            after: scalar, not negative, that owners wait for before they sum anything, and for all
                that arrives, where the columns travel in one round.

        Returns:
            [S, O, F] float32 sums in the order of `requests.owned`.
        """
        if self.hops:
            arrived = []
            if after is not None and self.rounds == 1:
                every = range(len(gradient_SxUxF))
                arrived = [self._send(gradient_SxUxF, vector, requests) for vector in every]
                # A number of each vector, which is not looked at before.
                late = (after < 0).astype(jnp.int32)
                firsts = [jax.lax.dynamic_index_in_dim(rows, late)[0, 0] for rows in arrived]
                some = [jnp.abs(number.astype(jnp.float32)) for number in firsts]
                requests = requests.summed_after(functools.reduce(jnp.add, some, after))

            def send(gradient_SxUxW, vector, whole, corner):
                rows = arrived[vector] if arrived else self._send(gradient_SxUxW, vector, requests)
                sums_OxW = self._sum(rows, requests)
                return jax.lax.dynamic_update_slice(whole, sums_OxW[None], corner)

            sums_SxOxF = self._by_vector(send, gradient_SxUxF, self.owned_rows, jnp.float32)
        else:
            real_Ux1 = (requests.rows < self.num_rows)[:, None]
            sums_SxUxF = jnp.where(real_Ux1, gradient_SxUxF.astype(jnp.float32), 0)
            if requests.home is None:
                sums_SxOxF = resized(sums_SxUxF, self.owned_rows, axis=1)
            else:
                vectors, _, width = sums_SxUxF.shape
                empty = jnp.zeros((vectors, self.owned_rows, width), jnp.float32)
                sums_SxOxF = empty.at[:, requests.home].set(sums_SxUxF, mode="drop")
        axes = self.copy_axes
        return jax.lax.psum(sums_SxOxF, axes) if axes else sums_SxOxF

    def _search(self, rows: jax.Array, counted: bool) -> tuple[Requests, Found]:
        """Requests, and what they need room for; tokens are counted on the way if so asked."""
        way = self._way(rows)
        listed, inverse, order = self._sorted(way)
        tokens: jax.Array | None = None
        if counted:
            real = (way < self.num_rows).astype(jnp.int32)
            tokens = whole_sums(real.reshape(-1), inverse.reshape(-1), self.unique_rows)
        mine, unique = self._row_of(listed), self._count(listed)
        hops, pairs, counts = [], [], []
        asked, size = listed, self.num_rows
        for hop, capacity, room in zip(self.hops, self.capacities, self._rooms, strict=True):
            # Numbers on the way of one peer's rows and of all that lie behind it.
            size //= hop.peers
            starts, sent, slot = slots_of(
                listed // size % hop.peers, listed < self.num_rows, hop.peers, capacity
            )
            pairs.append(jnp.max(jnp.diff(starts)))
            asked = self._swap(taken(listed, sent, self.num_rows), hop)
            listed, index, arrivals = self._distinct(asked, room)
            index = jnp.where(asked < self.num_rows, index, room)
            if tokens is not None:
                tokens = whole_sums(self._swap(taken(tokens, sent, 0), hop), index, room)
            hops.append(HopRequests(sent, slot, index, arrivals))
            counts.append(self._count(listed))
        asked, home = self._count(asked), None
        if self.copy_axes:
            listed, home, tokens = self._united(listed, tokens)
            asked = jax.lax.psum(asked, self.copy_axes)
            if hops:
                index = taken(home, hops[-1].arrived, self.owned_rows)
                arrivals = order_of(index, self.owned_rows)
                hops[-1] = dataclasses.replace(hops[-1], arrived=index, order=arrivals)
        elif not hops:
            listed = resized(listed, self.owned_rows, self.num_rows)
            tokens = None if tokens is None else resized(tokens, self.owned_rows)
        requests = Requests(
            rows=mine,
            inverse=inverse,
            order=order,
            owned=jnp.where(listed < self.num_rows, self._row_of(listed), self.num_rows),
            home=None if hops else home,
            hops=tuple(hops),
            distinct=unique,
            asked=asked,
        )
        found = Found(unique, self._count(listed), tuple(pairs), tuple(counts[:-1]), tokens)
        return requests, found

    def _united(self, listed_N: jax.Array, tokens_N: jax.Array | None):
        """The rows [O] that all copies of this owner are asked for, where [N] they have this one's,
        and their tokens [O] if those are given.
        """
        axes, size = self.copy_axes, listed_N.shape[0]
        gathered = jax.lax.all_gather(listed_N, axes, tiled=True)
        united_O, index, _ = self._distinct(gathered, self.owned_rows)
        tokens_O = None
        if tokens_N is not None:
            gathered = jax.lax.all_gather(tokens_N, axes, tiled=True)
            tokens_O = whole_sums(gathered, index, self.owned_rows)
        own_N = jax.lax.dynamic_slice_in_dim(index, jax.lax.axis_index(axes) * size, size)
        return united_O, jnp.where(listed_N < self.num_rows, own_N, self.owned_rows), tokens_O

    def _fetch(self, block_OxW: jax.Array, requests: Requests) -> tuple[jax.Array, jax.Array]:
        """Rows of one vector as they arrive, and where this device's [U] are among them."""
        # What lies in empty slots is never looked at, so any row may go there.
        pick, rows = requests.hops[-1].arrived, block_OxW
        for number in reversed(range(len(self.hops))):
            rows = self._swap(rows[jnp.minimum(pick, rows.shape[0] - 1)], self.hops[number])
            pick = requests.hops[number].slot
            if number:
                # A relay puts what arrives straight into the slots of the hop before.
                wanted = requests.hops[number - 1].arrived
                pick = pick[jnp.minimum(wanted, pick.shape[0] - 1)]
        return rows, pick

    def _put_picked(self, whole_SxUxF, corner, rows_NxW, pick_U, requests: Requests) -> jax.Array:
        """`whole` with the picked rows [U, W] from a corner on, zero where they are not real."""
        number, real_U = len(pick_U), requests.rows < self.num_rows

        def put(whole_SxUxF, start, size, masked):
            pick, real = (jax.lax.dynamic_slice(x_U, (start,), (size,)) for x_U in (pick_U, real_U))
            rows = rows_NxW.at[pick].get(mode="promise_in_bounds")
            rows = jnp.where(real[:, None], rows, 0) if masked else rows
            vector, _, column = corner
            return jax.lax.dynamic_update_slice(whole_SxUxF, rows[None], (vector, start, column))

        if self.way not in SORTED or number <= _PIECE:
            return put(whole_SxUxF, 0, number, True)

        def one_piece(masked, piece, whole_SxUxF):
            # The last may overlap the one before; it puts the same.
            return put(whole_SxUxF, jnp.minimum(piece * _PIECE, number - _PIECE), _PIECE, masked)

        # A mask takes three times as long as the rows, and few pieces at the end need one.
        pieces, full = -(-number // _PIECE), self._count(requests.rows) // _PIECE
        whole_SxUxF = jax.lax.fori_loop(0, pieces, functools.partial(one_piece, False), whole_SxUxF)
        return jax.lax.fori_loop(
            0, pieces - full, lambda piece, whole: one_piece(True, full + piece, whole), whole_SxUxF
        )

    def _send(self, gradient_SxUxW: jax.Array, vector: int, requests: Requests) -> jax.Array:
        """What arrives of one vector at its owners."""
        arrived: jax.Array | None = None
        for number, (hop, record) in enumerate(zip(self.hops, requests.hops, strict=True)):
            # Behind the listed rows sums are undefined, and a product with zero may spread that.
            sent = jnp.where(record.sent < len(record.slot), record.sent, 0)
            if arrived is None:
                rows = of_vector(gradient_SxUxW, vector, sent)
            else:
                rows = self._sums_of(arrived, requests, number - 1)[sent]
            arrived = self._swap(rows, hop)
        assert arrived is not None
        return arrived

    def _sums_of(self, arrived: jax.Array, requests: Requests, number: int) -> jax.Array:
        """Of what came by a hop; what a relay's sums have behind its rows is nobody's."""
        record, room = requests.hops[number], self._rooms[number] + spare_rows(self.way)
        return sum_by_row(arrived, record.arrived, room, self.way, record.order)

    def _sum(self, arrived: jax.Array, requests: Requests) -> jax.Array:
        """One vector's sums [O, W]."""
        sums = self._sums_of(arrived, requests, len(self.hops) - 1)
        if self.way == "scatter":
            return sums[: self.owned_rows]
        real_O = requests.owned < self.num_rows
        return jnp.where(real_O[:, None], sums[: self.owned_rows], 0)

    def _by_vector(self, way, rows_SxNxF: jax.Array, room: int, dtype) -> jax.Array:
        """[S, room, F], written by `way(rows, vector, whole, corner)` vector by vector.

        It writes W columns at a corner of the whole, those of a round. Each vector is read where it
        lies and written where it belongs, so that none is copied.
        """
        vectors, number, width = rows_SxNxF.shape
        part = -(-width // self.rounds)
        whole = jax.lax.empty((vectors, room, width), dtype)

        def one_round(vector, turn, whole):
            # The last part may overlap the one before; it brings the same.
            first = jnp.minimum(turn * part, width - part)
            columns = jax.lax.dynamic_slice(rows_SxNxF, (vector, 0, first), (1, number, part))
            return way(columns, 0, whole, (vector, 0, first))

        for vector in range(vectors):
            if part == width:
                whole = way(rows_SxNxF, vector, whole, (vector, 0, 0))
            else:
                turn = functools.partial(one_round, vector)
                whole = jax.lax.fori_loop(0, -(-width // part), turn, whole)
        return whole

    def _sorted(self, way: jax.Array) -> tuple[jax.Array, jax.Array, RowOrder]:
        """The distinct rows [U], the index of each key's row among them, and the index's order.

        One sort serves all of it; with several micro-batches each needs an order of its own.
        """
        distinct_U, inverse, order = self._distinct(way.reshape(-1), self.unique_rows)
        # Padding sorts last and may fall off the end; its gradient is zero, any row serves it.
        inverse = jnp.minimum(inverse, self.unique_rows - 1).reshape(way.shape)
        if len(way) > 1:
            order = jax.vmap(lambda index: order_of(index, self.unique_rows))(inverse)
        else:
            ranks = jnp.minimum(order.ranks, self.unique_rows - 1)
            order = RowOrder(order.positions[None], ranks[None])
        return distinct_U, inverse, order

    def _way(self, rows: jax.Array) -> jax.Array:
        """Rows numbered by the digits of their owners, those of the first hop first; V_pad stays.

        So whatever list of rows a device has, those for one peer stand together.
        """
        owner, way = rows // self.rows_per_owner, jnp.zeros_like(rows)
        for hop in self.hops:
            way = way * hop.peers + owner // hop.stride % hop.peers
        way = way * self.rows_per_owner + rows % self.rows_per_owner
        return jnp.where(rows < self.num_rows, way, self.num_rows)

    def _row_of(self, way: jax.Array) -> jax.Array:
        """The inverse of `_way`."""
        behind, row = self.num_rows, way % self.rows_per_owner
        for hop in self.hops:
            behind //= hop.peers
            row += way // behind % hop.peers * hop.stride * self.rows_per_owner
        return jnp.where(way < self.num_rows, row, self.num_rows)

    def _distinct(self, numbers_N: jax.Array, room: int) -> tuple[jax.Array, jax.Array, RowOrder]:
        """[room] sorted distinct numbers, V_pad behind; where [N] each is; that index sorted."""
        positions_N = jnp.argsort(numbers_N)
        sorted_N = numbers_N[positions_N]
        starts_N = jnp.concatenate([jnp.ones(1, bool), sorted_N[1:] != sorted_N[:-1]])
        ranks_N = jnp.cumsum(starts_N, dtype=jnp.int32) - 1
        found = jnp.full(room, self.num_rows, jnp.int32)
        found = found.at[jnp.where(starts_N, ranks_N, room)].set(sorted_N, mode="drop")
        index_N = jnp.zeros_like(ranks_N).at[positions_N].set(ranks_N, unique_indices=True)
        return found, index_N, dense_order(positions_N, ranks_N)

    def _count(self, listed: jax.Array) -> jax.Array:
        return jnp.sum(listed < self.num_rows)

    def _swap(self, blocks: jax.Array, hop: Hop) -> jax.Array:
        """Sends each peer its share of the slots; what comes back has the sources in order."""
        groups = None if hop.peers == self.num_owners else hop.groups(self.num_owners)
        return jax.lax.all_to_all(
            blocks, self.vocab_axes, 0, 0, tiled=True, axis_index_groups=groups
        )
