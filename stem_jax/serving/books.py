"""Who waits and who is in which slot; the engine holds its lock around every call."""

import math
import time
from collections import Counter, deque

from stem_jax.serving.prompt_parts import PromptPart, PromptParts
from stem_jax.serving.request import Finish, QueueFull
from stem_jax.serving.ticket import Ticket

# Finished requests that say how fast places become free, and the longest wait that is named.
_REMEMBERED = 32
_LONGEST_RETRY = 60.0


class Books:
    """The waiting requests, in their order, and the slots."""

    def __init__(self, slots: int, queue: int, parts: PromptParts):
        self.waiting: deque[Ticket] = deque()
        self.slots: list[Ticket | None] = [None] * slots
        # Those that have a slot or tokens under way.
        self.running: set[Ticket] = set()
        self.cancelled: list[Ticket] = []
        self.finished: Counter[Finish] = Counter()
        self.prompt_tokens = self.new_tokens = 0
        self._queue, self._parts = queue, parts
        self._times: deque[float] = deque(maxlen=_REMEMBERED)

    @property
    def most(self) -> int:
        """Tickets that can be there at a time."""
        return len(self.slots) + self._queue

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.running or self.cancelled)

    def add(self, tickets: list[Ticket]) -> None:
        """All of them, or none; see `check_room`."""
        self.check_room(len(tickets))
        self.waiting.extend(tickets)

    def check_room(self, more: int) -> None:
        """Raises QueueFull where not so many more may wait; those for whom a slot is free do not
        count."""
        free = self.slots.count(None)
        if len(self.waiting) + more > self._queue + free:
            raise QueueFull(len(self.waiting), self._retry_after())

    def take_cancelled(self) -> list[Ticket]:
        """Those to be told that they are."""
        cancelled = [ticket for ticket in dict.fromkeys(self.cancelled) if ticket.finish is None]
        self.cancelled = []
        return cancelled

    def remove(self, ticket: Ticket) -> None:
        """Takes a ticket that has ended out, wherever it is."""
        assert ticket.finish is not None
        self.running.discard(ticket)
        self.free(ticket)
        if ticket in self.waiting:
            self.waiting.remove(ticket)
        self.finished[ticket.finish] += 1
        self._times.append(time.monotonic())

    def free(self, ticket: Ticket) -> None:
        """Frees its slot, if it has one."""
        if ticket.slot is not None:
            self.slots[ticket.slot] = None
            ticket.slot = None

    def next_part(self) -> PromptPart | None:
        """What to read next of prompts; None: of those that have a slot all was read."""
        for ticket in self.slots:
            if ticket is not None and not ticket.is_read:
                return self._part([ticket])
        free = [number for number, ticket in enumerate(self.slots) if ticket is None]
        number = self._parts.how_many(list(self.waiting)[: len(free)], len(free))
        if not number:
            return None
        tickets = [self.waiting.popleft() for _ in range(number)]
        for ticket, slot in zip(tickets, free, strict=False):
            self.slots[slot], ticket.slot = ticket, slot
            self.running.add(ticket)
        return self._part(tickets)

    def _part(self, tickets: list[Ticket]) -> PromptPart:
        before = sum(ticket.read for ticket in tickets)
        part = self._parts.part(tickets)
        self.prompt_tokens += sum(ticket.read for ticket in tickets) - before
        return part

    def active(self) -> list[tuple[int, Ticket]]:
        """Slots whose next token can be asked for, and whose they are."""
        taken = [(slot, ticket) for slot, ticket in enumerate(self.slots) if ticket is not None]
        return [(slot, ticket) for slot, ticket in taken if ticket.is_read]

    def ask(self, tickets: list[Ticket]) -> None:
        """One more token of each was asked for; who needs no further gives its slot up."""
        for ticket in tickets:
            ticket.asked += 1
            if ticket.asked == ticket.limit:
                self.free(ticket)

    def _retry_after(self) -> float:
        if len(self._times) < 2:
            return 1.0
        each = (time.monotonic() - self._times[0]) / len(self._times)
        return float(min(_LONGEST_RETRY, max(1.0, math.ceil(each))))
