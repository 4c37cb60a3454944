"""Batches from token stores: random training batches and the validation set in order.

A training batch is a pure function of (seed, step): a run resumes, on any number of processes,
from its step alone.
"""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

import grain
import numpy as np

from stem_jax.data.token_store import TokenStore
from stem_jax.errors import InputError

Batch = dict[str, np.ndarray]


class GlobalBatches:
    """Endless shuffled batches from a weighted mixture of stores.

    Rows are drawn without replacement, in another order each epoch. The rows of global batch t are
    the slices of all processes in process order, whatever their number.
    """

    def __init__(
        self,
        stores: Sequence[tuple[TokenStore, float]],
        *,
        seq_len: int,
        global_batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        num_threads: int = 4,
        prefetch: int = 8,
    ):
        """stores: (store, weight); a batch holds rows in proportion to the weights.

        seq_len: tokens per row. global_batch_size: rows per step over all processes.
        prefetch: batches that `iterate` reads ahead, on `num_threads` threads.
        Raises InputError if the batch does not divide over the processes, a weight is not positive,
        or a store is shorter than a row.
        """
        if not stores:
            raise InputError("data needs at least one source: set data.sources")
        local_batch_size = _local_batch_size(global_batch_size, process_index, process_count)
        sources, weights = [], []
        for index, (store, weight) in enumerate(stores):
            if not weight > 0:
                raise InputError(
                    f"weight {weight} of source {store.meta.name!r} must be a positive number"
                )
            # Another seed for each source, or stores of one length would be in lockstep.
            source_seed = np.random.SeedSequence([seed, index]).generate_state(1)[0]
            rows = grain.MapDataset.source(_Rows(store, seq_len))
            # The shuffle adds the epoch to its seed, so each epoch has its own order.
            sources.append(rows.shuffle(seed=int(source_seed)).repeat())
            weights.append(float(weight))
        mixture = grain.MapDataset.mix(sources, weights)
        # Dropping a remainder that never comes: grain rounds the other length up past sys.maxsize.
        batches = mixture.batch(local_batch_size, drop_remainder=True)
        self._batches = batches[process_index::process_count]
        self._read_options = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=prefetch
        )

    def batch(self, step: int) -> Batch:
        """This process's slice of global batch `step`; every array is [B_local, L].

        Keys: tokens, targets, segment_ids, positions (int32) and loss_mask (float32), as described
        at `TokenStore.row`.
        """
        return self._batches[step]

    def iterate(self, start_step: int = 0) -> "BatchIterator":
        """batch(start_step), batch(start_step + 1), ... without end, read ahead on threads."""
        ahead = self._batches[start_step:].to_iter_dataset(self._read_options)
        return BatchIterator(iter(ahead))


class BatchIterator(Iterator[Batch]):
    """An endless iterator of batches that owns threads: close it, or use it in a `with`."""

    def __init__(self, batches: grain.DatasetIterator):
        self._batches = batches
        self._closed = False

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        return next(self._batches)

    def close(self) -> None:
        """Stops the threads. Further reads raise StopIteration."""
        if not self._closed:
            self._closed = True
            self._batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class ValidationBatches:
    """Every row of the validation stores, in order, in global batches of one size.

    The last batch is filled with rows whose loss_mask and segment_ids are 0. `max_batches` cuts the
    set to its first batches.

    num_batches: global batches in one pass.
    num_rows: rows that are not filling, over all processes.
    num_bytes: UTF-8 bytes of the text that is scored. A document that the cut goes through counts
        in proportion to its scored targets.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        *,
        seq_len: int,
        global_batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        max_batches: int | None = None,
    ):
        """Raises InputError if there is no store, or the batch does not divide over processes."""
        if not stores:
            raise InputError("validation needs a store: set data.validation_fraction above 0")
        if max_batches is not None and max_batches < 1:
            raise InputError(f"max_batches {max_batches} must be at least 1, or None for all")
        self.stores = tuple(stores)
        self._seq_len = seq_len
        self._local_batch_size = _local_batch_size(global_batch_size, process_index, process_count)
        self._global_batch_size = global_batch_size
        self._first_row = process_index * self._local_batch_size
        rows = [store.num_rows(seq_len, drop_last=False) for store in self.stores]
        # Store s holds the rows [row_starts[s], row_starts[s + 1]).
        self._row_starts = np.concatenate([[0], np.cumsum(rows)])
        self.num_rows = int(self._row_starts[-1])
        if max_batches is not None:
            self.num_rows = min(self.num_rows, max_batches * global_batch_size)
        self.num_batches = -(-self.num_rows // global_batch_size)
        self.num_bytes = round(sum(self._scored_bytes()))

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(index) for index in range(self.num_batches))

    def batch(self, index: int) -> Batch:
        """This process's slice of global batch `index`, shaped as in `GlobalBatches.batch`."""
        if not 0 <= index < self.num_batches:
            raise IndexError(f"validation batch {index} of {self.num_batches}")
        first = index * self._global_batch_size + self._first_row
        rows = [self._row(first + offset) for offset in range(self._local_batch_size)]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    def document_ids(self) -> Iterator[np.ndarray]:
        """Ids [n] of each document that is scored, up to its last scored token, in order.

        The first id is bos, which is read but never scored; all others are targets of one row.
        """
        for store, end in self._scored_ends():
            for document in range(store.num_documents):
                start = int(store.document_starts[document])
                if start + 1 >= end:
                    break
                yield store.document_ids(document)[: end - start]

    def _row(self, row: int) -> Batch:
        if row < self.num_rows:
            store = int(np.searchsorted(self._row_starts, row, side="right")) - 1
            return self.stores[store].row(row - int(self._row_starts[store]), self._seq_len)
        filling = self.stores[0].row(0, self._seq_len)
        return {key: np.zeros_like(value) for key, value in filling.items()}

    def _scored_ends(self) -> Iterator[tuple[TokenStore, int]]:
        """(store, one past the last token that is a target) for each store that is read."""
        for store, first in zip(self.stores, self._row_starts[:-1], strict=True):
            rows = self.num_rows - int(first)
            if rows > 0:
                yield store, min(rows * self._seq_len + 1, store.num_tokens)

    def _scored_bytes(self) -> Iterator[float]:
        for store, end in self._scored_ends():
            # Documents [0, cut) end at or before `end`.
            cut = int(np.searchsorted(store.document_starts, end, side="right")) - 1
            yield float(np.sum(store.document_bytes[:cut]))
            if cut < store.num_documents:
                start, stop = (int(edge) for edge in store.document_starts[cut : cut + 2])
                share = max(end - start - 1, 0) / (stop - start - 1)
                yield float(store.document_bytes[cut]) * share


class _Rows:
    """The full rows of a store as a random-access source for grain."""

    def __init__(self, store: TokenStore, seq_len: int):
        self._store = store
        self._seq_len = seq_len
        self._num_rows = store.num_rows(seq_len, drop_last=True)

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> Batch:
        return self._store.row(int(index), self._seq_len)

    def __repr__(self) -> str:
        return f"_Rows({self._store.folder}, seq_len={self._seq_len})"


def _local_batch_size(global_batch_size: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise InputError(
            f"process index {process_index} must lie in [0, {process_count}), the process count"
        )
    if global_batch_size < 1 or global_batch_size % process_count:
        raise InputError(
            f"train.global_batch_size {global_batch_size} does not divide over {process_count}"
            f" processes: use a positive multiple of {process_count}"
        )
    return global_batch_size // process_count
