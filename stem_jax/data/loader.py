"""Batches from token stores: random training batches and the validation set in order.

A training batch is a pure function of (seed, step): a run resumes, on any number of processes,
from its step alone.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import grain
import numpy as np

from stem_jax.data.rows import CUT, Rows, rows_of
from stem_jax.data.token_store import TokenStore
from stem_jax.errors import InputError

HostBatch = dict[str, np.ndarray]
# Keys of rows, by (tokens, segment ids), for what they belong to; they go with the batch under that
# name behind this prefix.
KeysOf = Callable[[np.ndarray, np.ndarray], Mapping[str, np.ndarray]]
KEYS = "keys of "


@dataclasses.dataclass(frozen=True)
class Share:
    """What one process reads of each global batch: some of the equal `parts` it is cut into."""

    parts: tuple[int, ...] = (0,)
    num_parts: int = 1

    @classmethod
    def of_devices(cls, shards: Sequence[int], num_shards: int, micro_batches: int) -> "Share":
        """The share of a process whose devices hold these of the batch's shards.

        A global batch is one micro-batch after the other, and each of them one shard after the
        other: what a row is trained with does not depend on the processes.
        """
        parts = (a * num_shards + shard for a in range(micro_batches) for shard in shards)
        return cls(tuple(parts), micro_batches * num_shards)

    def rows_of_part(self, global_batch_size: int) -> int:
        """Rows in a part. Raises InputError if the batch does not divide."""
        if global_batch_size < 1 or global_batch_size % self.num_parts:
            raise InputError(
                f"train.global_batch_size {global_batch_size} does not divide into "
                f"{self.num_parts} parts (micro-batches x devices that share the batch): use a "
                f"positive multiple of {self.num_parts}"
            )
        return global_batch_size // self.num_parts


WHOLE = Share()


class GlobalBatches:
    """Endless shuffled batches from a weighted mixture of stores.

    Rows are drawn without replacement, in another order each epoch. The rows of global batch t are
    its parts in their order, whichever processes read them.

    rows: of each store.
    """

    def __init__(
        self,
        stores: Sequence[tuple[TokenStore, float]],
        *,
        seq_len: int,
        global_batch_size: int,
        seed: int,
        share: Share = WHOLE,
        first_step: int = 0,
        num_threads: int = 4,
        prefetch: int = 8,
        keys_of: KeysOf | None = None,
        packing: str = CUT,
    ):
        """stores: (store, weight); a batch holds rows in proportion to the weights.

        seq_len: tokens per row. global_batch_size: rows per step over all processes.
        share: the parts of a batch that this process reads.
        first_step: the number of the first batch; there are none before.
        prefetch: batches that `iterate` reads ahead, on `num_threads` threads.
        keys_of: gives keys that go with each batch, made on these threads.
        packing: how documents become rows, see `rows.PACKINGS`.
        Raises InputError if the batch does not divide into parts, a weight is not positive, or a
        store is shorter than a row.
        """
        if not stores:
            raise InputError("data needs at least one source: set data.sources")
        rows_of_part = share.rows_of_part(global_batch_size)
        for store, weight in stores:
            if not weight > 0:
                raise InputError(
                    f"weight {weight} of source {store.meta.name!r} must be a positive number"
                )
        self.rows: tuple[Rows, ...] = tuple(
            rows_of(store, seq_len, packing, drop_last=True) for store, _ in stores
        )
        self._weights = [float(weight) for _, weight in stores]
        self._num_rows = [len(rows_of_store) for rows_of_store in self.rows]
        self._batch_size, self._seed = global_batch_size, seed
        mixture = self._mixture(self.rows)
        # Dropping a remainder that never comes: grain rounds the other length up past sys.maxsize.
        parts = mixture.batch(rows_of_part, drop_remainder=True)
        self._batches = grain.MapDataset.source(_Shares(parts, share, keys_of))
        self._first_step = first_step
        self._read_options = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=prefetch
        )

    def _mixture(self, rows_of_stores: Sequence[Any]) -> grain.MapDataset:
        """What stands for rows, store by store, in the order of the batches."""
        sources = []
        for index, rows in enumerate(rows_of_stores):
            # Another seed for each source, or stores of one length would be in lockstep.
            source_seed = np.random.SeedSequence([self._seed, index]).generate_state(1)[0]
            # The shuffle adds the epoch to its seed, so each epoch has its own order.
            shuffled = grain.MapDataset.source(rows).shuffle(seed=int(source_seed))
            sources.append(shuffled.repeat())
        return grain.MapDataset.mix(sources, self._weights)

    def times_read(self, step: int) -> list[np.ndarray]:
        """How often each row of a store is in the global batches before `step`, of all processes.

        Returns an array [rows of the store] int64 for each store. No token is read: some 50,000
        rows a second.
        """
        places = self._mixture([_Places(index, n) for index, n in enumerate(self._num_rows)])
        times = [np.zeros(n, np.int64) for n in self._num_rows]
        for index in range((step - self._first_step) * self._batch_size):
            store, row = places[index]
            times[store][row] += 1
        return times

    def batch(self, step: int) -> HostBatch:
        """This process's share of global batch `step`; every array is [B_local, L].

        Keys: tokens, targets, segment_ids, positions (int32) and loss_mask (float32), as described
        at `TokenStore.row`.
        """
        return self._batches[step - self._first_step]

    def iterate(self, start_step: int | None = None) -> "BatchIterator":
        """batch(start_step), batch(start_step + 1), ... without end, read ahead on threads.

        start_step: None is the first.
        """
        first = 0 if start_step is None else start_step - self._first_step
        ahead = self._batches[first:].to_iter_dataset(self._read_options)
        return BatchIterator(iter(ahead))


class BatchIterator(Iterator[HostBatch]):
    """An endless iterator of batches that owns threads: close it, or use it in a `with`."""

    def __init__(self, batches: grain.DatasetIterator):
        self._batches = batches
        self._closed = False

    def __next__(self) -> HostBatch:
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

    def __exit__(self, *_: object) -> None:
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
        share: Share = WHOLE,
        max_batches: int | None = None,
        keys_of: KeysOf | None = None,
        packing: str = CUT,
    ):
        """Raises InputError if there is no store, or the batch does not divide into parts."""
        if not stores:
            raise InputError("validation needs a store: set data.validation_fraction above 0")
        if max_batches is not None and max_batches < 1:
            raise InputError(f"max_batches {max_batches} must be at least 1, or None for all")
        self.stores = tuple(stores)
        self._seq_len = seq_len
        self._global_batch_size = global_batch_size
        self._keys_of = keys_of
        rows_of_part = share.rows_of_part(global_batch_size)
        # Rows of this process in a global batch.
        self._own_rows = [
            part * rows_of_part + row for part in share.parts for row in range(rows_of_part)
        ]
        self.rows: tuple[Rows, ...] = tuple(
            rows_of(store, seq_len, packing) for store in self.stores
        )
        rows = [len(rows_of_store) for rows_of_store in self.rows]
        # Whether each token but the first of a document is scored, and in the order of the store.
        self.scores_all = packing == CUT and all(store.scored is None for store in self.stores)
        # Store s holds the rows [row_starts[s], row_starts[s + 1]).
        self._row_starts = np.concatenate([[0], np.cumsum(rows)])
        self.num_rows = int(self._row_starts[-1])
        if max_batches is not None:
            self.num_rows = min(self.num_rows, max_batches * global_batch_size)
        self.num_batches = -(-self.num_rows // global_batch_size)
        self.num_bytes = round(
            sum(
                rows_of_store.scored_bytes(read)
                for rows_of_store, read in zip(self.rows, self._rows_read(), strict=True)
            )
        )

    @property
    def left_out(self) -> float:
        """Share of the text's bytes that no token stands for."""
        sizes = [store.num_bytes for store in self.stores]
        lost = sum(n * s.meta.left_out for n, s in zip(sizes, self.stores, strict=True))
        return lost / max(sum(sizes), 1)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[HostBatch]:
        return (self.batch(index) for index in range(self.num_batches))

    def batch(self, index: int) -> HostBatch:
        """This process's share of global batch `index`, shaped as in `GlobalBatches.batch`."""
        if not 0 <= index < self.num_batches:
            raise IndexError(f"validation batch {index} of {self.num_batches}")
        first = index * self._global_batch_size
        rows = [self._row(first + offset) for offset in self._own_rows]
        return with_keys(
            {key: np.stack([row[key] for row in rows]) for key in rows[0]}, self._keys_of
        )

    def document_ids(self) -> Iterator[np.ndarray]:
        """Ids [n] of each document that is scored, up to its last scored token, in order.

        Where `scores_all`.

        The first id is bos, which is read but never scored; all others are targets of one row.
        """
        for store, end in self.scored_ends():
            for document in range(store.num_documents):
                start = int(store.document_starts[document])
                if start + 1 >= end:
                    break
                yield store.document_ids(document)[: end - start]

    def scored_ends(self) -> Iterator[tuple[TokenStore, int]]:
        """(store, one past the last token that is a target) for each store that is read.

        Where `scores_all`.
        """
        for store, rows in zip(self.stores, self._rows_read(), strict=True):
            if rows:
                yield store, min(rows * self._seq_len + 1, store.num_tokens)

    def _rows_read(self) -> list[int]:
        """Rows of each store that are read, from its first one on."""
        edges = np.minimum(self._row_starts, self.num_rows)
        return np.diff(edges).tolist()

    def _row(self, row: int) -> HostBatch:
        if row < self.num_rows:
            store = int(np.searchsorted(self._row_starts, row, side="right")) - 1
            return self.rows[store][row - int(self._row_starts[store])]
        filling = self.rows[0][0]
        return {key: np.zeros_like(value) for key, value in filling.items()}


class _Places:
    """The full rows of a store by what they are called: (number of the store, row)."""

    def __init__(self, store: int, num_rows: int):
        self._store = store
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self._store, int(index)


class _Shares:
    """A process's share of each global batch, from a data set of the parts of all batches."""

    def __init__(self, parts: grain.MapDataset, share: Share, keys_of: KeysOf | None):
        self._parts = parts
        self._share = share
        self._keys_of = keys_of

    def __len__(self) -> int:
        return sys.maxsize // self._share.num_parts

    def __getitem__(self, step: int) -> HostBatch:
        first = int(step) * self._share.num_parts
        found = [self._parts[first + part] for part in self._share.parts]
        batch = {key: np.concatenate([part[key] for part in found]) for key in found[0]}
        return with_keys(batch, self._keys_of)

    def __repr__(self) -> str:
        return f"_Shares({self._share})"


def with_keys(batch: HostBatch, keys_of: KeysOf | None) -> HostBatch:
    """A batch with the keys that belong to it."""
    if keys_of is None:
        return batch
    keys = keys_of(batch["tokens"], batch["segment_ids"])
    return batch | {f"{KEYS}{name}": array for name, array in keys.items()}
