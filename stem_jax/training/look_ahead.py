"""Batches ahead of their steps: what each asks of the table, and its rows on their way.

Stages by step distance, with `tables.prefetch` = n: batch t+n is placed and its demand counted on
the device before step t is dispatched, in program order, so that every process reads the same; once
step t computes, the demand of batch t+n has come to the host, its slots are chosen and its missing
rows start to travel; before step t+n they are swapped in.

Rows of the batches in flight stay where they are while there are slots for all of them. A batch
that needs more takes those of the ones before it, which leave after their steps: the look-ahead is
shorter there, and nothing else changes.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator

import jax
import numpy as np

from stem_jax.goodput.account import COMPUTING, DATA, ROWS, Account
from stem_jax.memory.memory import prefix
from stem_jax.tables.asked_rows import AskedRows
from stem_jax.tables.prefetch import Prefetch, Ticket
from stem_jax.tables.sharded_table import Demand
from stem_jax.tables.spec import TableState
from stem_jax.training.batch import Batch
from stem_jax.training.reads import ReadSizes
from stem_jax.training.state import TrainState
from stem_jax.training.step import TrainStep


@dataclasses.dataclass(eq=False)
class Ready:
    """A batch and what its step needs besides the state.

    demand: what it asks of the tables. sizes: of its row blocks. Of offloaded tables, asked: its
    rows, tickets: those on their way, slots: where they will lie. settled: tickets before it, whose
    rows were brought early. metrics: of its rows' way, once they are placed.
    """

    batch: Batch
    demand: dict[str, Demand]
    sizes: ReadSizes | None = None
    asked: dict[str, AskedRows] | None = None
    tickets: dict[str, Ticket] | None = None
    slots: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    settled: list[dict[str, Ticket]] = dataclasses.field(default_factory=list)
    metrics: dict[str, np.float64] = dataclasses.field(default_factory=dict)


class LookAhead(Iterator[Ready]):
    """Yields batches in order. Between `next` and the batch's step, `place` brings its rows.

    In training the rows of the batches in flight stay where they are if they can, so `settle` may
    bring all of them at once when the table is needed for something else.
    """

    def __init__(
        self,
        programs: TrainStep,
        batches: Iterator[Batch],
        length: int,
        prefetches: dict[str, Prefetch],
        *,
        training: bool = True,
        account: Account | None = None,
    ):
        """Args:
        length: how many of the batches will be asked for; no more are read.
        prefetches: of offloaded tables, by memory.
        training: rows of batches in flight are kept, and their use is counted.
        account: gets the time that it takes.
        """
        self._programs = programs
        self._batches = batches
        self._unread = length
        self._prefetches = prefetches
        self._training = training
        self._part = (account or Account()).part
        self._distance = programs.config.tables.prefetch
        self._queue: deque[Ready] = deque()
        # Rows of the batches that may still be waiting for theirs when the next one chooses.
        self._window: deque[dict[str, AskedRows]] = deque(maxlen=self._distance if training else 0)

    def __next__(self) -> Ready:
        """Raises TooFewSlots for a batch that does not fit, when those before it are done."""
        # Their demands were dispatched before the step that computes now.
        for ready in self._queue:
            if not self._choose(ready):
                break
        while self._unread and len(self._queue) <= self._distance:
            with self._part(DATA):
                batch = next(self._batches)
            with self._part(COMPUTING):
                demand = self._programs.demand(batch) if self._programs.reads.memories else {}
            self._queue.append(Ready(batch, demand))
            self._unread -= 1
        if not self._queue:
            raise StopIteration
        ready = self._queue.popleft()
        if not self._choose(ready):
            raise next(
                self._prefetches[name].too_few(asked)
                for name, asked in (ready.asked or {}).items()
                if not self._prefetches[name].fits(asked)
            )
        return ready

    def place(self, state: TrainState, ready: Ready) -> TrainState:
        """The state with the rows of a batch in their slots; the given one is donated."""
        if not ready.tickets:
            return state
        with self._part(ROWS):
            state = self._apply(state, ready.tickets)
            for name, prefetch in self._prefetches.items():
                tickets = [brought[name] for brought in (*ready.settled, ready.tickets)]
                found = _measured(prefetch, tickets)
                ready.metrics |= {f"{prefix(name)}/{key}": value for key, value in found.items()}
        return state

    def settle(self, state: TrainState) -> TrainState:
        """Brings all rows that are on their way, so that the caches say what lies where.

        The batches choose anew afterwards: what is done meanwhile may take their rows away.
        """
        for ready in self._queue:
            if ready.tickets is not None:
                with self._part(ROWS):
                    state = self._apply(state, ready.tickets)
                ready.settled.append(ready.tickets)
                ready.tickets, ready.slots = None, {}
        self._window.clear()
        return state

    def _choose(self, ready: Ready) -> bool:
        """Chooses the slots of a batch; False if it has more rows than there are slots."""
        # The device says what it counted once it is done with the steps before.
        with self._part(COMPUTING):
            if ready.sizes is None:
                ready.sizes = self._programs.reads.sizes_for(ready.batch, ready.demand)
            if not self._prefetches or ready.tickets is not None:
                return True
            if ready.asked is None:
                ready.asked = self._programs.asked_by(ready.batch, ready.demand)
        with self._part(ROWS):
            return self._choose_slots(ready, ready.asked)

    def _choose_slots(self, ready: Ready, asked_rows: dict[str, AskedRows]) -> bool:
        if not all(self._prefetches[name].fits(asked) for name, asked in asked_rows.items()):
            return False
        # The caches know of a batch that chose before.
        record = self._training and not ready.settled
        tables = self._programs.reads.tables(ready.batch, ready.sizes)
        ready.tickets = {}
        for name, prefetch in self._prefetches.items():
            asked = asked_rows[name]
            pinned = prefetch.staying(asked, [before[name] for before in self._window])
            ticket = prefetch.ticket(asked, pinned, record=record)
            ready.tickets[name] = ticket
            ready.slots[name] = prefetch.slots(ticket, tables[name].exchange.owned_rows)
        self._window.append(asked_rows)
        return True

    def _apply(self, state: TrainState, tickets: dict[str, Ticket]) -> TrainState:
        tables = dict(state.tables)
        for name, ticket in tickets.items():
            arrays = self._prefetches[name].apply(dict(vars(tables.pop(name))), ticket)
            tables[name] = TableState(**arrays)
        return dataclasses.replace(state, tables=tables)


def _measured(prefetch: Prefetch, tickets: list[Ticket]) -> dict[str, np.float64]:
    """Hit rates by row and by token; what had to come, how long it took and who waited."""
    asked, tokens = max(tickets[-1].move.asked, 1), max(tickets[-1].move.tokens, 1)
    missing = sum(ticket.move.missing for ticket in tickets)
    missing_tokens = sum(ticket.move.missing_tokens for ticket in tickets)
    values = {
        # A row that came early and left again counts twice, as it travelled.
        "row_hit_rate": max(0.0, 1 - missing / asked),
        "token_hit_rate": max(0.0, 1 - missing_tokens / tokens),
        "evictions": missing,
        "missing_bytes": missing * prefetch.row_bytes,
        "transfer_seconds": sum(ticket.seconds for ticket in tickets),
        "stall_seconds": prefetch.take_stall(),
        **prefetch.store.take_counts(),
    }
    return {name: np.float64(value) for name, value in values.items()}
