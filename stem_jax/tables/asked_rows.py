"""The rows that a batch asks of each owner of a table, as the host knows them."""

import dataclasses
from collections.abc import Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class AskedRows:
    """By owner: rows [n] int64, distinct and rising, numbered in its shard; their tokens [n]."""

    rows: tuple[np.ndarray, ...]
    tokens: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, owners: Iterable[tuple[np.ndarray, np.ndarray]]) -> "AskedRows":
        """From the rows and tokens of each owner."""
        rows, tokens = zip(*owners, strict=True)
        return cls(tuple(r.astype(np.int64) for r in rows), tuple(tokens))

    @classmethod
    def of_tokens(cls, rows: np.ndarray, num_rows: int, num_owners: int) -> "AskedRows":
        """From the row of every token, numbered within the table of `num_rows`."""
        distinct, tokens = np.unique(rows, return_counts=True)
        size = num_rows // num_owners
        ends = np.searchsorted(distinct, size * np.arange(1, num_owners))
        owned = np.split(distinct, ends), np.split(tokens, ends)
        return cls.of((r - owner * size, t) for owner, (r, t) in enumerate(zip(*owned)))

    @property
    def slots_needed(self) -> int:
        """Slots over all owners that hold these rows at a time; every owner has as many."""
        return len(self.rows) * max(len(rows) for rows in self.rows)

    def united(self, others: Iterable["AskedRows"]) -> "AskedRows":
        """The rows that any of them asks for, without tokens."""
        lines = zip(self.rows, *(other.rows for other in others), strict=True)
        return AskedRows.of((np.unique(np.concatenate(line)), np.empty(0)) for line in lines)
