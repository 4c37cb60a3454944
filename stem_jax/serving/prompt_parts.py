"""Prompts cut into parts of few shapes, each read by one call of a program."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from stem_jax.generation.buckets import bucket, padded
from stem_jax.serving.slot_state import Settings
from stem_jax.serving.ticket import Ticket

# Tokens, padding included, that are read between two steps of the others: with 512, matrices are
# read as often for the prompts as for the step.
_MOST_TOKENS = 512
_TOGETHER = 4


@dataclasses.dataclass(frozen=True)
class PromptPart:
    """What one call reads of some prompts.

    tickets: whose they are, fewer than P. begins: whether it is their first part. tokens: [P, L].
    lengths, slots: [P] int32; those of nobody are empty and go nowhere. settings: of each.
    """

    tickets: tuple[Ticket, ...]
    begins: bool
    tokens: np.ndarray
    lengths: np.ndarray
    slots: np.ndarray
    settings: Settings


class PromptParts:
    """The shapes of parts.

    together: numbers P of prompts. longest: tokens of one part; a longer prompt has several.
    most_tokens: of all prompts of a part, padding included.
    """

    def __init__(self, context: int, slots: int, shards: int = 1, most_tokens: int | None = None):
        """Args:
        shards: of the batch, over which P divides.
        most_tokens: of a part, all prompts and padding together; None: as many as is good.
        """
        self._context, self._slots, self._shards = context, slots, shards
        self.most_tokens = min(_MOST_TOKENS, most_tokens or _MOST_TOKENS)
        self.longest = min(context, self.most_tokens // shards)
        self.together = sorted({shards, -(-_TOGETHER // shards) * shards})

    def shapes(self) -> list[tuple[bool, int, int]]:
        """(whether parts begin prompts, P, L) of all calls that there will ever be."""
        lengths = sorted({self.length_of(n) for n in range(1, self.longest + 1)})
        found = [(True, P, L) for P in self.together for L in lengths if self._fits(P, L)]
        if self._context > self.longest:
            found.append((False, self._shards, self.longest))
        return found

    def length_of(self, tokens: int) -> int:
        """L of a first part of so many tokens."""
        return min(bucket(tokens), self.longest)

    def how_many(self, waiting: Sequence[Ticket], free: int) -> int:
        """How many of the first that wait begin in one call, where so many slots are free."""
        longest, most = 0, 0
        for number, ticket in enumerate(waiting[: min(free, self.together[-1])], start=1):
            length = self.length_of(len(ticket.request.prompt_ids))
            longest = max(longest, length)
            if not self._fits(self._place_for(number), longest):
                break
            most = number
        # A call for many that is half empty costs more than one for each.
        return most if 2 * most > self._place_for(most) else min(most, self.together[0])

    def part(self, tickets: Sequence[Ticket]) -> PromptPart:
        """The next part of prompts, which are all at their beginning, or one that is not.

        Each ticket has a slot; `read` moves on.
        """
        begins = tickets[0].read == 0
        texts = [t.request.prompt_ids[t.read : t.read + self.longest] for t in tickets]
        length = self.length_of(max(map(len, texts))) if begins else self.longest
        for ticket, text in zip(tickets, texts, strict=True):
            ticket.read += len(text)
        return self.filled(tickets, texts, self._place_for(len(tickets)), length, begins)

    def nothing(self, begins: bool, prompts: int, length: int) -> PromptPart:
        """A part of a shape in which nobody's prompt is."""
        return self.filled((), (), prompts, length, begins)

    def filled(self, tickets, texts, prompts: int, length: int, begins: bool) -> PromptPart:
        """A part of P prompts and length L."""
        missing = prompts - len(tickets)
        slots = [ticket.slot for ticket in tickets] + [self._slots] * missing
        lengths = [*map(len, texts), *[0] * missing]
        return PromptPart(
            tuple(tickets),
            begins,
            padded([*texts, *[()] * missing], length),
            np.array(lengths, np.int32),
            np.array(slots, np.int32),
            _settings(tickets, missing),
        )

    def _place_for(self, number: int) -> int:
        return next(size for size in self.together if size >= number)

    def _fits(self, prompts: int, length: int) -> bool:
        return prompts == self.together[0] or prompts * length <= self.most_tokens


def _settings(tickets: Sequence[Ticket], missing: int) -> Settings:
    """Of the tickets, and greedy ones."""
    how = [ticket.request.sampling.scalars() for ticket in tickets]
    how += [(np.float32(0), np.int32(0), np.float32(1))] * missing
    temperature, top_k, top_p = (np.array(values) for values in zip(*how, strict=True))
    seeds = [ticket.request.seed for ticket in tickets] + [0] * missing
    return Settings(np.array(seeds, np.uint32), temperature, top_k, top_p)
