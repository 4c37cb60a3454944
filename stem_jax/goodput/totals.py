"""The times of a process, summed over all its starts."""

import dataclasses
from collections.abc import Sequence
from typing import Self

from stem_jax.goodput.account import PARTS, RESTART
from stem_jax.goodput.start_record import StartRecord


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums of a process.

    process: its number. starts: how many. seconds: from the beginning of the first to the last
    record, which parts sum up to. steps: that it made, of them redone: those made before a kill
    that a later start made again. tokens: of the steps. clock_seconds: by how much the clocks of
    its hosts were found to differ at least; a gap between starts that they made negative counts as
    none, one that they lengthened as it was told.
    """

    process: int
    starts: int
    seconds: float
    parts: dict[str, float]
    steps: int
    redone: int
    tokens: int
    clock_seconds: float

    @classmethod
    def of(cls, starts: Sequence[StartRecord]) -> Self:
        """Args: starts: of one process, oldest first, at least one."""
        parts = dict.fromkeys(PARTS, 0.0)
        clock_seconds, redone, made = 0.0, 0, 0
        for before, start in zip([None, *starts], starts, strict=False):
            for name, seconds in start.parts.items():
                parts[name] = parts.get(name, 0.0) + seconds
            if before is not None:
                gap = before.seconds_until(start)
                parts[RESTART] += max(gap, 0.0)
                clock_seconds += max(-gap, 0.0)
            if start.first_step is not None:
                redone += max(0, min(made, start.step) - start.first_step + 1)
                made = max(made, start.step)
        return cls(
            process=starts[-1].process,
            starts=len(starts),
            seconds=sum(parts.values()),
            parts=parts,
            steps=sum(start.steps_made for start in starts),
            redone=redone,
            tokens=sum(start.tokens for start in starts),
            clock_seconds=clock_seconds,
        )
