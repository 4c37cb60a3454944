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

import jax
import jax.numpy as jnp

from stem_jax.kernels.row_sums import RowOrder, dense_order, order_of, spare_rows, sum_by_row
from stem_jax.mesh import BATCH_AXES
from stem_jax.tables.hops import Hop


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HopRequests:
    """One hop of the requests of a device, N listed rows, n peers, room for C rows of a pair.

    sent: [n * C] int32, which of the listed rows each slot asks a peer for; N where it is empty.
    slot: [N] int32, the slot of each listed row.
    arrived: [n * C] int32, which row of this device's next list (of `owned` after the last hop)
        each arrived request names; past its end where the slot is empty.
    order: of `arrived`.
    """

    sent: jax.Array
    slot: jax.Array
    arrived: jax.Array
    order: RowOrder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Requests:
    """Which rows a device needs and which rows it is asked for.

    rows: [U] int32, distinct rows of this device's keys; V_pad fills the rest.
    inverse: index of each key's row in `rows`, shape of the keys.
    order: of `inverse`, one for each micro-batch, arrays [A, M].
    owned: [O] int32, sorted distinct rows that this device is asked for, all of its own shard;
        V_pad fills the rest.
    home: [U] int32, where `owned` has this device's own `rows`; None where they take hops.
    hops: one record for each.
    distinct: scalar int32, number of distinct rows in `rows`.
    asked: scalar int32, requests that arrived at this device as an owner.
    slots: [O] int32, where the owner's device holds the rows of `owned`; past the end for what
        fills the rest. None if all rows are resident, each at its own place.
    """

    rows: jax.Array
    inverse: jax.Array
    order: RowOrder
    owned: jax.Array
    home: jax.Array | None
    hops: tuple[HopRequests, ...]
    distinct: jax.Array
    asked: jax.Array
    slots: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Found:
    """What a search for a batch's rows needs room for, and what the owners are asked for.

    unique, owned: scalars, distinct rows of this device and of it as an owner. pairs: in each hop,
    the most rows that it asks a peer for. relayed: after each hop but the last, its distinct rows
    as a relay. tokens: [O], tokens of each row of `Requests.owned`, over all devices.
    """

    unique: jax.Array
    owned: jax.Array
    pairs: tuple[jax.Array, ...]
    relayed: tuple[jax.Array, ...]
    tokens: jax.Array


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The sizes of an exchange; its methods run on every device inside `shard_map`.

    Attributes:
        num_rows: V_pad.
        vocab_axes: mesh axes that shard the rows; the other batch axes hold copies.
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

    def fetch(self, block_OxW: jax.Array, requests: Requests) -> jax.Array:
        """Brings rows to every device from their owners: of one vector or of several.

        Args:
            block_OxW: this owner's rows, in the order of `requests.owned`.

        Returns:
            [U, W] rows in the order of `requests.rows`; what pads the end is zero.
        """
        fetched_UxW = self._by_columns(
            self._fetch, block_OxW, self.unique_rows, block_OxW.dtype, requests
        )
        return jnp.where((requests.rows < self.num_rows)[:, None], fetched_UxW, 0)

    def push(self, gradient_UxW: jax.Array, requests: Requests) -> jax.Array:
        """Sends row gradients to the owners: of one vector or of several.

        They set out in the dtype they have, and travel on from a relay as its float32 sums.

        Returns:
            [O, W] float32 sums in the order of `requests.owned`.
        """
        sums_OxW = self._by_columns(
            self._push, gradient_UxW, self.owned_rows, jnp.float32, requests
        )
        axes = self._copy_axes()
        return jax.lax.psum(sums_OxW, axes) if axes else sums_OxW

    def _search(self, rows: jax.Array, counted: bool) -> tuple[Requests, Found]:
        """Requests, and what they need room for; tokens are counted on the way if so asked."""
        way = self._way(rows)
        listed, inverse, order = self._sorted(way)
        tokens = None
        if counted:
            real = (way < self.num_rows).astype(jnp.int32)
            tokens = _sums(real.reshape(-1), inverse.reshape(-1), self.unique_rows)
        mine, unique = self._row_of(listed), self._count(listed)
        hops, pairs, counts = [], [], []
        asked, size = listed, self.num_rows
        for hop, capacity, room in zip(self.hops, self.capacities, self._rooms, strict=True):
            # Numbers on the way of one peer's rows and of all that lie behind it.
            size //= hop.peers
            starts, sent, slot = _slots(
                listed // size % hop.peers, listed < self.num_rows, hop.peers, capacity
            )
            pairs.append(jnp.max(jnp.diff(starts)))
            asked = self._swap(_taken(listed, sent, self.num_rows), hop)
            listed, index, arrivals = self._distinct(asked, room)
            index = jnp.where(asked < self.num_rows, index, room)
            if counted:
                tokens = _sums(self._swap(_taken(tokens, sent, 0), hop), index, room)
            hops.append(HopRequests(sent, slot, index, arrivals))
            counts.append(self._count(listed))
        asked, home = self._count(asked), None
        if self._copy_axes():
            listed, home, tokens = self._united(listed, tokens)
            asked = jax.lax.psum(asked, self._copy_axes())
            if hops:
                index = _taken(home, hops[-1].arrived, self.owned_rows)
                arrivals = order_of(index, self.owned_rows)
                hops[-1] = dataclasses.replace(hops[-1], arrived=index, order=arrivals)
        elif not hops:
            listed = _resized(listed, self.owned_rows, self.num_rows)
            tokens = _resized(tokens, self.owned_rows) if counted else None
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
        axes, size = self._copy_axes(), listed_N.shape[0]
        gathered = jax.lax.all_gather(listed_N, axes, tiled=True)
        united_O, index, _ = self._distinct(gathered, self.owned_rows)
        tokens_O = None
        if tokens_N is not None:
            gathered = jax.lax.all_gather(tokens_N, axes, tiled=True)
            tokens_O = _sums(gathered, index, self.owned_rows)
        own_N = jax.lax.dynamic_slice_in_dim(index, jax.lax.axis_index(axes) * size, size)
        return united_O, jnp.where(listed_N < self.num_rows, own_N, self.owned_rows), tokens_O

    def _fetch(self, block_OxW: jax.Array, requests: Requests) -> jax.Array:
        if not self.hops:
            if requests.home is None:
                return _resized(block_OxW, self.unique_rows)
            return block_OxW[jnp.minimum(requests.home, self.owned_rows - 1)]
        # What lies in empty slots is never looked at, so any row may go there.
        pick, rows = requests.hops[-1].arrived, block_OxW
        for number in reversed(range(len(self.hops))):
            rows = self._swap(rows[jnp.minimum(pick, rows.shape[0] - 1)], self.hops[number])
            pick = requests.hops[number].slot
            if number:
                # A relay puts what arrives straight into the slots of the hop before.
                wanted = requests.hops[number - 1].arrived
                pick = pick[jnp.minimum(wanted, pick.shape[0] - 1)]
        return rows[pick]

    def _push(self, gradient_UxW: jax.Array, requests: Requests) -> jax.Array:
        if not self.hops:
            valid_U = requests.rows < self.num_rows
            sums = jnp.where(valid_U[:, None], gradient_UxW.astype(jnp.float32), 0)
            if requests.home is None:
                return _resized(sums, self.owned_rows)
            empty = jnp.zeros((self.owned_rows, sums.shape[1]), jnp.float32)
            return empty.at[requests.home].set(sums, mode="drop")
        sums = gradient_UxW
        for hop, record, room in zip(self.hops, requests.hops, self._rooms, strict=True):
            # Behind the listed rows sums are undefined, and a product with zero may spread that.
            sent = jnp.where(record.sent < len(record.slot), record.sent, 0)
            arrived = self._swap(sums[sent], hop)
            # What a relay's sums have behind its rows is nobody's.
            room += spare_rows(self.way)
            sums = sum_by_row(arrived, record.arrived, room, self.way, record.order)
        if self.way == "scatter":
            return sums[: self.owned_rows]
        real_O = requests.owned < self.num_rows
        return jnp.where(real_O[:, None], sums[: self.owned_rows], 0)

    def _by_columns(self, way, rows: jax.Array, room: int, dtype, requests: Requests) -> jax.Array:
        """`way(rows, requests)` [room, W], a part of the columns in each round."""
        width = rows.shape[1]
        part = -(-width // self.rounds)
        if part == width:
            return way(rows, requests)

        def one_round(number, whole):
            # The last part may overlap the one before; it brings the same.
            first = jnp.minimum(number * part, width - part)
            columns = jax.lax.dynamic_slice_in_dim(rows, first, part, axis=1)
            columns = way(columns, requests)
            return jax.lax.dynamic_update_slice_in_dim(whole, columns, first, axis=1)

        empty = jnp.zeros((room, width), dtype)
        return jax.lax.fori_loop(0, -(-width // part), one_round, empty)

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

    def _copy_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis in BATCH_AXES if axis not in self.vocab_axes)

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


def _slots(peer_N: jax.Array, real_N: jax.Array, peers: int, capacity: int):
    """Where each peer's rows start among those listed; row of each slot; slot of each row."""
    size = peer_N.shape[0]
    peer_N = jnp.where(real_N, peer_N, peers)
    starts = jnp.sum(peer_N < jnp.arange(peers + 1)[:, None], axis=1, dtype=jnp.int32)
    place = starts[:-1, None] + jnp.arange(capacity, dtype=jnp.int32)
    sent = jnp.where(place < starts[1:, None], place, size).reshape(-1)
    slot_N = peer_N * capacity + jnp.arange(size, dtype=jnp.int32) - starts[peer_N]
    return starts, sent, jnp.minimum(slot_N, peers * capacity - 1)


def _taken(values_N: jax.Array, index: jax.Array, empty) -> jax.Array:
    """Values at the indices, and `empty` for those past the end."""
    size = values_N.shape[0]
    return jnp.where(index < size, values_N[jnp.minimum(index, size - 1)], empty)


def _sums(numbers: jax.Array, index: jax.Array, room: int) -> jax.Array:
    """Whole numbers summed by index; those past the end are dropped."""
    return jnp.zeros(room, jnp.int32).at[index].add(numbers, mode="drop")


def _resized(rows: jax.Array, size: int, fill=0) -> jax.Array:
    """The first rows, or all and `fill` behind them."""
    more = max(0, size - rows.shape[0])
    padding = ((0, more), *((0, 0),) * (rows.ndim - 1))
    return jnp.pad(rows[:size], padding, constant_values=fill)
