"""What rows of a token store teach: how often each id, and which parts of documents."""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from stem_jax.data.token_store import TokenStore

# Inputs that are counted at a time: 20 MiB of memory.
_PIECE_TOKENS = 1 << 20


@dataclasses.dataclass(frozen=True)
class PairCounts:
    """How often ids were in a scored pair of an input and its target.

    inputs_V: [V] int64, as the input, whose rows a memory reads. targets_V: [V] int64, as the
    target. The sums of both are equal.
    """

    inputs_V: np.ndarray
    targets_V: np.ndarray


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part of a document that lies in one row: ids [start, stop) of the store.

    All but the first are scored, as in training. document: its number in the store.
    """

    store: TokenStore
    document: int
    start: int
    stop: int

    @property
    def scored(self) -> int:
        """Tokens that are scored."""
        return self.stop - self.start - 1

    @property
    def ids(self) -> np.ndarray:
        """[n] ids."""
        return np.asarray(self.store.tokens[self.start : self.stop])

    def ids_behind(self, count: int) -> np.ndarray:
        """[n + m] ids with up to `count` of the document before them."""
        first = max(int(self.store.document_starts[self.document]), self.start - count)
        return np.asarray(self.store.tokens[first : self.stop])


def count_pairs(
    store: TokenStore, times_R: np.ndarray, seq_len: int, vocab_size: int
) -> PairCounts:
    """Counts the scored pairs of a store's rows, of which row r is read `times_R[r]` times.

    Args:
        times_R: [rows] integers, of the first rows of `seq_len` inputs, all of them full.
    """
    inputs_V, targets_V = np.zeros(vocab_size), np.zeros(vocab_size)
    step = max(1, _PIECE_TOKENS // seq_len)
    for first in range(0, len(times_R), step):
        times = times_R[first : first + step]
        if not times.any():
            continue
        start = first * seq_len
        stop = start + len(times) * seq_len
        weights = np.repeat(times, seq_len).astype(np.float64)
        # Whatever comes before the start of a document is scored with nothing.
        low, high = np.searchsorted(store.document_starts, [start + 1, stop + 1])
        weights[np.asarray(store.document_starts[low:high]) - start - 1] = 0
        inputs_V += np.bincount(store.tokens[start:stop], weights, vocab_size)
        targets_V += np.bincount(store.tokens[start + 1 : stop + 1], weights, vocab_size)
    return PairCounts(inputs_V.astype(np.int64), targets_V.astype(np.int64))


def pieces_of(store: TokenStore, seq_len: int, rows: Iterable[int]) -> Iterator[Piece]:
    """The parts of documents in some rows of `seq_len` inputs, of which a token is scored."""
    starts = store.document_starts
    for row in rows:
        start = int(row) * seq_len
        stop = min(start + seq_len, store.num_tokens - 1)
        document = int(np.searchsorted(starts, start, side="right")) - 1
        while start < stop:
            end = min(stop + 1, int(starts[document + 1]))
            if end - start > 1:
                yield Piece(store, document, start, end)
            start, document = int(starts[document + 1]), document + 1
