"""Rows that the batches in flight need at a time, read from the data before a run begins."""

import dataclasses
from collections import deque
from collections.abc import Iterator

import numpy as np

from stem_jax.config import Config
from stem_jax.data.loader import HostBatch
from stem_jax.memory.memory import Memory
from stem_jax.tables.asked_rows import AskedRows
from stem_jax.tables.spec import TableSpec
from stem_jax.training.run_data import RunData

# Reading them takes a second or two; later batches may need more, and the run then says so. Small
# batches take a millisecond each, whatever they hold.
_TOKENS, _BATCHES = 2**22, 1000


@dataclasses.dataclass(frozen=True)
class WorkingSet:
    """Rows that are needed at a time: by one batch, and by all in flight without waiting."""

    batch: int
    in_flight: int


def working_set(
    config: Config, memory: Memory, spec: TableSpec, num_owners: int, data: RunData, start: int
) -> WorkingSet:
    """What `tables.resident_rows` must be, and should be, for the batches from step `start` on.

    Looks at as many batches as hold some four million tokens, and a thousand at most; with several
    processes at this process's share of them, which asks for fewer rows.
    """
    window: deque[AskedRows] = deque(maxlen=config.tables.prefetch + 1)
    one = in_flight = 0
    for batch in _training_batches(config, data, start):
        window.append(_asked(memory, spec, num_owners, batch))
        one = max(one, window[-1].slots_needed)
        in_flight = max(in_flight, window[-1].united(window).slots_needed)
    for batch in _few(config, data.held_out or ()):
        # Validation keeps nothing for the batches around it.
        one = max(one, _asked(memory, spec, num_owners, batch).slots_needed)
    return WorkingSet(one, max(one, in_flight))


def most_rows(config: Config, memory: Memory, spec: TableSpec) -> int:
    """Rows that a run can come to write: those that it begins with, and one for each key."""
    token = np.zeros((1, 1), np.int32)
    keys = config.train.steps * config.tokens_per_step * memory.keys(token, token + 1).size
    return min(spec.num_rows, spec.num_slots + keys)


def _training_batches(config: Config, data: RunData, start: int) -> Iterator[HostBatch]:
    batches = (data.batches.batch(step) for step in range(start, config.train.steps))
    return _few(config, batches)


def _few(config: Config, batches) -> Iterator[HostBatch]:
    # A full window at least, or the figure would be too small from the start.
    number = min(_BATCHES, _TOKENS // config.tokens_per_step)
    number = max(config.tables.prefetch + 1, number)
    return (batch for _, batch in zip(range(number), batches, strict=False))


def _asked(memory: Memory, spec: TableSpec, num_owners: int, batch: HostBatch) -> AskedRows:
    keys = memory.keys(batch["tokens"], batch["segment_ids"])
    rows = spec.layout.row_numbers(keys[batch["segment_ids"] > 0].reshape(-1))
    return AskedRows.of_tokens(rows, spec.num_rows, num_owners)
