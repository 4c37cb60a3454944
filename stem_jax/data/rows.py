"""The rows of a token store: cut from its tokens one after the other, or made of whole documents.

With L = 6, documents of 4, 8, 3 and 3 tokens (a, b, c, d; a document of n tokens has n - 1 inputs)

    cut     a a a a b b | b b b b b b | c c c d d
    whole   a a a c c . | b b b b b b | d d . . . .     of b one input is not read

Whole documents are packed best fit, the longest first: each goes where it leaves least, or begins a
row. So rows are a function of the store and L alone.
"""

import bisect
from typing import Protocol

import numpy as np

from stem_jax.data.token_store import TokenStore
from stem_jax.errors import InputError

CUT, WHOLE = "cut", "whole"
PACKINGS = (CUT, WHOLE)


class Rows(Protocol):
    """Rows of `seq_len` inputs, by their number.

    store: of the documents in them.
    """

    store: TokenStore

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The arrays that `TokenStore.row` describes."""

    def scored_bytes(self, rows: int) -> float:
        """UTF-8 bytes of the text that is scored in the first rows.

        A document that is not read to its end counts in proportion to its targets.
        """

    def packed_row(self) -> int | None:
        """The first row with several documents; None if each has one."""

    @property
    def note(self) -> str:
        """What to say of them before they are read; "" where there is nothing to say."""


def rows_of(store: TokenStore, seq_len: int, packing: str = CUT, drop_last: bool = False) -> Rows:
    """The rows of a store.

    packing: one of PACKINGS. drop_last: of rows that are cut, leave out one that padding would
        fill; whole documents leave padding anywhere.
    Raises InputError for an unknown packing, a length below 1, or one that leaves no row.
    """
    if packing not in PACKINGS:
        raise InputError(f"data.packing={packing!r} is unknown: use one of {', '.join(PACKINGS)}")
    return CutRows(store, seq_len, drop_last) if packing == CUT else WholeRows(store, seq_len)


class CutRows:
    """Row i is the tokens [i L, i L + L], wherever documents begin."""

    note = ""

    def __init__(self, store: TokenStore, seq_len: int, drop_last: bool = False):
        self.store = store
        self._seq_len = seq_len
        self._num_rows = store.num_rows(seq_len, drop_last)

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.store.row(int(index), self._seq_len)

    def __repr__(self) -> str:
        return f"CutRows({self.store.folder}, seq_len={self._seq_len})"

    def scored_bytes(self, rows: int) -> float:
        store, end = self.store, min(rows * self._seq_len + 1, self.store.num_tokens)
        # Documents [0, cut) end at or before `end`.
        cut = int(np.searchsorted(store.document_starts, end, side="right")) - 1
        total = float(np.sum(store.document_bytes[:cut]))
        if cut < store.num_documents:
            start, stop = (int(edge) for edge in store.document_starts[cut : cut + 2])
            share = max(end - start - 1, 0) / (stop - start - 1)
            total += float(store.document_bytes[cut]) * share
        return total

    def packed_row(self) -> int | None:
        return self.store.packed_row(self._seq_len)


class WholeRows:
    """Each document lies in one row, from its first token on; what is longer than L is cut there.

    Rows come in the order of their first documents in the store, documents of a row in theirs.
    """

    def __init__(self, store: TokenStore, seq_len: int):
        """Takes a second for a million documents."""
        if seq_len < 1:
            raise InputError(f"seq_len {seq_len} must be at least 1")
        self.store = store
        self._seq_len = seq_len
        inputs_n = np.diff(store.document_starts) - 1
        self._sizes = np.minimum(inputs_n, seq_len)
        cut_n = inputs_n > seq_len
        self._cut = int(np.sum(cut_n))
        self._unread = int(np.sum(inputs_n - self._sizes))
        self._unscored = self._scored_behind(np.flatnonzero(cut_n))
        # Documents of row r are [edges[r], edges[r + 1]) of `documents`.
        self._documents, self._edges = _in_rows(_packed(self._sizes, seq_len))

    def __len__(self) -> int:
        return len(self._edges) - 1

    def __repr__(self) -> str:
        return f"WholeRows({self.store.folder}, seq_len={self._seq_len})"

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        store, length = self.store, self._seq_len
        row: dict[str, np.ndarray] = {
            name: np.zeros(length, np.int32)
            for name in ("tokens", "targets", "segment_ids", "positions")
        }
        row["loss_mask"] = np.zeros(length, np.float32)
        at = 0
        first, last = self._edges[int(index)], self._edges[int(index) + 1]
        for segment, document in enumerate(self._documents[first:last], start=1):
            start, size = int(store.document_starts[document]), int(self._sizes[document])
            ids = store.ids(start, start + size + 1)
            place = slice(at, at + size)
            row["tokens"][place], row["targets"][place] = ids[:-1], ids[1:]
            row["segment_ids"][place] = segment
            row["positions"][place] = np.arange(size)
            row["loss_mask"][place] = (
                1 if store.scored is None else store.scored[start + 1 : start + size + 1]
            )
            at += size
        return row

    def scored_bytes(self, rows: int) -> float:
        documents = self._documents[: self._edges[rows]]
        inputs = np.diff(self.store.document_starts)[documents] - 1
        shares = self._sizes[documents] / inputs
        return float(np.sum(self.store.document_bytes[documents] * shares))

    def packed_row(self) -> int | None:
        packed = np.flatnonzero(np.diff(self._edges) > 1)
        return int(packed[0]) if len(packed) else None

    @property
    def note(self) -> str:
        full = int(np.sum(self._sizes)) / (len(self) * self._seq_len)
        told = (
            f"{self.store.num_documents:,} documents in {len(self):,} rows of {self._seq_len:,} "
            f"tokens (data.packing=whole), {full:.1%} full"
        )
        if self._cut:
            told += (
                f"; {self._cut:,} of them are longer than train.seq_len and cut there, "
                f"{self._unread:,} tokens are not read"
            )
        if self._unscored:
            told += f", {self._unscored:,} of {self.store.num_scored:,} scored ones among them"
        return told

    def _scored_behind(self, cut: np.ndarray) -> int:
        """Tokens of conversations that are scored and not read. cut: the documents that are.

        Raises InputError if no others are scored.
        """
        store = self.store
        if store.scored is None or not len(cut):
            return 0
        behind = sum(
            int(np.count_nonzero(store.scored[start + self._seq_len + 1 : stop]))
            for start, stop in zip(
                store.document_starts[cut], store.document_starts[cut + 1], strict=True
            )
        )
        if behind == store.num_scored:
            raise InputError(
                f"token store {store.folder} has no scored token within the first "
                f"{self._seq_len + 1} of a conversation (data.packing=whole cuts there); set a "
                "larger train.seq_len"
            )
        return behind


def _packed(sizes_n: np.ndarray, seq_len: int) -> np.ndarray:
    """[n] the row of each document. sizes_n: [n] inputs of each, 1 to seq_len."""
    row_n = np.empty(len(sizes_n), np.int64)
    # Rows by what is left in them, and what is left in some, ascending.
    open_rows: dict[int, list[int]] = {}
    left: list[int] = []
    rows = 0
    order = np.argsort(-sizes_n, kind="stable")
    for document, size in zip(order.tolist(), sizes_n[order].tolist(), strict=True):
        place = bisect.bisect_left(left, size)
        if place == len(left):
            row, rest = rows, seq_len - size
            rows += 1
        else:
            room = left[place]
            row, rest = open_rows[room].pop(), room - size
            if not open_rows[room]:
                del open_rows[room], left[place]
        row_n[document] = row
        if rest:
            if rest not in open_rows:
                open_rows[rest] = []
                bisect.insort(left, rest)
            open_rows[rest].append(row)
    return row_n


def _in_rows(row_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(documents row by row, where each row begins and the last one ends)."""
    _, first_R = np.unique(row_n, return_index=True)
    number_R = np.empty(len(first_R), np.int64)
    number_R[np.argsort(first_R)] = np.arange(len(first_R))
    numbered_n = number_R[row_n]
    counts_R = np.bincount(numbered_n)
    edges = np.concatenate([[0], np.cumsum(counts_R)])
    return np.argsort(numbered_n, kind="stable"), edges
