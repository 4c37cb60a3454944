"""A process of a run, as its records and the lock of the folder tell of it."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from stem_jax.goodput.start_record import StartRecord, boot, record_path
from stem_jax.lock import Holder


@dataclasses.dataclass(frozen=True)
class Member:
    """A process.

    start: its newest one. lives: as far as the lock tells. silent: seconds since its last record.
    """

    start: StartRecord
    lives: bool
    silent: float

    @property
    def index(self) -> int:
        """Its number in the run."""
        return self.start.process


def members(
    workdir: Path, processes: Sequence[Sequence[StartRecord]], holders: Sequence[Holder]
) -> list[Member]:
    """The processes of the newest start, which says how many there are.

    Args:
        processes: starts of every process that ever was.
    """
    newest = max((starts[-1] for starts in processes), key=lambda start: start.began_time)
    alive = {(holder.host, holder.pid) for holder in holders if holder.lives}
    return [
        Member(
            start=starts[-1],
            lives=(starts[-1].host, starts[-1].pid) in alive,
            silent=_age(workdir, starts[-1]),
        )
        for starts in processes
        if starts[-1].process < newest.processes
    ]


def _age(workdir: Path, start: StartRecord) -> float:
    if start.boot and start.boot == boot():
        return max(0.0, time.monotonic() - start.until_clock)
    # Of another machine, by the clock of the file system; a clock that is ahead makes it too young.
    written = record_path(workdir, start.process).stat().st_mtime
    return max(0.0, time.time() - written)
