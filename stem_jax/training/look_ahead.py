"""Batches with the sizes of their row blocks, counted on the device two steps ahead."""

from collections import deque
from collections.abc import Iterator

import jax
import numpy as np

from stem_jax.tables.sharded_table import BlockSizes
from stem_jax.training.step import Batch, TrainStep

_DISTANCE = 2


class LookAhead(Iterator[tuple[Batch, BlockSizes | None]]):
    """Yields (batch t, its block sizes) while the counts of batch t+2 are on their way.

    Every process dispatches the count at the same place in its program order and reads the same
    result, so all of them compile and run the same step. A dense model has no sizes: None.
    """

    def __init__(self, programs: TrainStep, batches: Iterator[Batch], length: int):
        """Args: `length` is how many of the batches will be asked for; no more are read."""
        self._programs = programs
        self._batches = batches
        self._unread = length
        self._queue: deque[tuple[Batch, jax.Array | None]] = deque()

    def __next__(self) -> tuple[Batch, BlockSizes | None]:
        while self._unread and len(self._queue) <= _DISTANCE:
            batch = next(self._batches)
            counts = self._programs.count(batch) if self._programs.spec.num_layers else None
            self._queue.append((batch, counts))
            self._unread -= 1
        if not self._queue:
            raise StopIteration
        batch, counts = self._queue.popleft()
        if counts is None:
            return batch, None
        return batch, self._programs.table(batch.tokens).choose_sizes(np.asarray(counts))
