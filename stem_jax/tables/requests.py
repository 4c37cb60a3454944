"""What a device asks of a table in a step, and what it is asked for: the record of an exchange."""

import dataclasses

import jax
import jax.numpy as jnp

from stem_jax.kernels.row_sums import RowOrder


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

    def summed_after(self, value: jax.Array) -> "Requests":
        """The same, but where gradients belong at their owners is known after the value.

        A compiler ends an exchange where its sums begin, and would put these before work that it
        could lie beneath. Barriers are gone when libtpu makes its schedule.

        Args:
            value: a scalar that is not negative.
        """
        if not self.hops:
            return self
        *others, last = self.hops
        # Zero, which no compiler knows.
        nothing = (value < 0).astype(jnp.int32)
        order = dataclasses.replace(last.order, positions=last.order.positions + nothing)
        last = dataclasses.replace(last, arrived=last.arrived + nothing, order=order)
        return dataclasses.replace(self, hops=(*others, last))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Found:
    """What a search for a batch's rows needs room for, and what the owners are asked for.

    unique, owned: scalars, distinct rows of this device and of it as an owner. pairs: in each hop,
    the most rows that it asks a peer for. relayed: after each hop but the last, its distinct rows
    as a relay. tokens: [O], tokens of each row of `Requests.owned`, over all devices; None where
    they were not counted.
    """

    unique: jax.Array
    owned: jax.Array
    pairs: tuple[jax.Array, ...]
    relayed: tuple[jax.Array, ...]
    tokens: jax.Array | None
