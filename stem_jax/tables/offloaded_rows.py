"""Rows of an offloaded table for forward passes without gradients: generation and evaluation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from stem_jax.errors import InputError
from stem_jax.mesh import replicated
from stem_jax.tables.asked_rows import AskedRows
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.kept_rows import reserved
from stem_jax.tables.prefetch import Prefetch
from stem_jax.tables.row_optimizer import RowOptimizer
from stem_jax.tables.spec import TableState, logical, stored
from stem_jax.tables.update_history import UpdateHistory

# Rows that catch up at a time, as in `ShardedTable.caught_up_rows`.
_PIECE = 1024
# As few keys as these get a row each: a program for every number of distinct ones is no gain.
_FEW_KEYS = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotRows:
    """Rows that lie in slots, as a compiled program reads them.

    rows: stored, [S, R, F]. slots: [U] int32 of the distinct keys. inverse: index of each
    key's row among them, int32 of the shape of the keys.
    """

    rows: jax.Array
    slots: jax.Array
    inverse: jax.Array

    blocks = 1

    def block(self, keys_BxL: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
        """See `row_source.ServedRows`."""
        rows_SxUxF = self.rows[:, self.slots]
        return rows_SxUxF.astype(dtype), self.inverse.reshape(keys_BxL.shape)


class OffloadedRows:
    """A row source with R rows on the devices and the others in host memory."""

    def __init__(
        self,
        store: HostStore,
        mesh: Mesh,
        policy: str,
        step: int = 0,
        history: UpdateHistory | None = None,
    ):
        """Args:
        store: rows alone, up to date; or with moments, and then they catch up as they are read.
        mesh: of devices that each hold some columns of every row.
        policy: of the cache, see `RowCache`.
        step: update that rows catch up with.
        history: of the updates until then; None for rows that are up to date.
        """
        self.spec = store.spec
        self._mesh = mesh
        self._lag = None if history is None else (jnp.int32(step), history)
        self._read = jax.jit(self._caught_up)
        self._prefetch = Prefetch(mesh, store, policy, ahead=0, read_only=True)
        self._arrays = self._prefetch.load()
        self._one_room = False

    @property
    def room(self) -> int:
        """See `row_source.RowSource`."""
        return self.spec.num_slots

    def fix_shapes(self, most_keys: int) -> None:
        """See `row_source.RowSource`."""
        self._one_room = True
        self._arrays = self._prefetch.compile(self._arrays, min(most_keys, self.room))

    def close(self) -> None:
        """Ends the threads."""
        self._prefetch.close()

    def serve(self, keys: jax.Array) -> SlotRows:
        """Fetches the rows of the distinct keys that are not in a slot; waits for the keys.

        Raises:
            InputError: there are more distinct keys than slots.
        """
        rows = self.spec.layout.row_numbers(np.asarray(keys).reshape(-1))
        distinct_U, inverse, tokens_U = np.unique(rows, return_inverse=True, return_counts=True)
        if len(distinct_U) > self.spec.num_slots:
            what = "tokens" if keys.ndim < 3 else "n-grams"
            raise InputError(
                f"the prompts have {len(distinct_U)} distinct {what} at a time and "
                f"{self.spec.resident_key}={self.spec.num_slots} keeps fewer rows on the device; "
                f"give --resident-rows={len(distinct_U)} or more, or fewer prompts at a time"
            )
        ticket = self._prefetch.ticket(AskedRows.of({0: (distinct_U, tokens_U)}, 1))
        self._arrays = self._prefetch.apply(self._arrays, ticket)
        room = rows.size
        if room > _FEW_KEYS and not self._one_room:
            room = min(room, 1 << (len(distinct_U) - 1).bit_length())
        slots_U = np.zeros(room, np.int32)
        slots_U[: len(distinct_U)] = ticket.move.assignments[0].slots
        whole = replicated(self._mesh)
        inverse = jax.device_put(inverse.reshape(keys.shape).astype(np.int32), whole)
        slots = jax.device_put(slots_U, whole)
        if self._lag is None:
            return SlotRows(self._arrays["rows"], slots, inverse)
        rows_SxUxF = self._read(self._arrays, slots, *self._lag)
        places = jax.device_put(np.arange(room, dtype=np.int32), whole)
        return SlotRows(rows_SxUxF, places, inverse)

    def _caught_up(self, arrays, slots_U, step, history) -> jax.Array:
        """[S, U, F] float32."""
        found = RowOptimizer(self.spec).read(TableState(**arrays), slots_U, step, history)
        return found.rows


def caught_up_store(
    store: HostStore, step: int, history: UpdateHistory, row_format: str = "float32"
) -> HostStore:
    """The rows of a store as of update `step`, without moments, each number the nearest.

    In place, where they have that format already: the store that is given must not be used any
    more, as it shares its rows with the new one.
    """
    optimizer = RowOptimizer(store.spec)
    dtype = jnp.dtype(row_format)

    @functools.partial(jax.jit, static_argnames="dtype")
    def read(piece, dtype=None):
        state = TableState(**{name: stored(field) for name, field in piece.items()})
        places = jnp.arange(state.rows.shape[1])
        rows = logical(optimizer.read(state, places, step, history).rows)
        return rows if dtype is None else rows.astype(dtype)

    blocks = []
    for block in store.blocks:
        rows = block.arrays["rows"]
        rows = rows if rows.dtype == dtype else reserved(rows.shape, dtype)
        # The last piece is shorter, not an overlap: a row must not catch up twice.
        for first in range(0, block.count, _PIECE):
            part = slice(first, min(first + _PIECE, block.count))
            piece = {name: array[part] for name, array in block.arrays.items()}
            rows[part] = read(piece, dtype)
        blocks.append(dataclasses.replace(block, arrays={"rows": rows}))
    made = store.first
    if made is not None:
        # What they have decayed by until then.
        one = {
            field.name: np.full(store.spec.shape(field.name, 1), field.name == "rows", field.dtype)
            for field in store.spec.fields
            if field.name in store.fields
        }
        made = made.scaled(float(read(one).reshape(-1)[0]))
    spec = dataclasses.replace(store.spec, row_format=row_format)
    return HostStore(spec, tuple(blocks), made)
