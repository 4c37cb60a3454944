"""The rows that a batch asks of the owners of a table that a process holds."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class AskedRows:
    """What a process knows of a batch: the lists of its own owners, and how long the longest is.

    rows: by owner, [n] int64, distinct and rising, numbered in its shard. tokens: by owner, [n] of
    each row. num_owners: of the whole table. most: rows that are asked of the busiest of all
    owners; of what only this process knows, of the busiest of its own.
    """

    rows: Mapping[int, np.ndarray]
    tokens: Mapping[int, np.ndarray]
    num_owners: int
    most: int

    @classmethod
    def of(
        cls,
        owners: Mapping[int, tuple[np.ndarray, np.ndarray]],
        num_owners: int,
        most: int | None = None,
    ) -> "AskedRows":
        """From the rows and tokens of each owner; `most` is that of these if it is not given."""
        rows = {owner: found.astype(np.int64, copy=False) for owner, (found, _) in owners.items()}
        tokens = {owner: found for owner, (_, found) in owners.items()}
        if most is None:
            most = max((len(found) for found in rows.values()), default=0)
        return cls(rows, tokens, num_owners, most)

    @classmethod
    def of_tokens(cls, rows: np.ndarray, num_rows: int, num_owners: int) -> "AskedRows":
        """Of all owners, from the row of every token, numbered within the table of `num_rows`."""
        distinct, tokens = np.unique(rows, return_counts=True)
        size = num_rows // num_owners
        ends = np.searchsorted(distinct, size * np.arange(1, num_owners))
        owned = enumerate(zip(np.split(distinct, ends), np.split(tokens, ends), strict=True))
        return cls.of({owner: (r - owner * size, t) for owner, (r, t) in owned}, num_owners)

    @property
    def slots_needed(self) -> int:
        """Slots over all owners that hold these rows at a time; every owner has as many."""
        return self.num_owners * self.most

    def of_owners(self, owners: Collection[int]) -> "AskedRows":
        """What is asked of some of the owners that this process holds."""
        part = {owner: (self.rows[owner], self.tokens[owner]) for owner in owners}
        return AskedRows.of(part, self.num_owners)

    def united(self, others: Iterable["AskedRows"]) -> "AskedRows":
        """The rows that any of them asks of these owners, without tokens."""
        others = list(others)
        lists = {
            owner: [mine, *(o.rows[owner] for o in others)] for owner, mine in self.rows.items()
        }
        return AskedRows.of(
            {o: (np.unique(np.concatenate(rows)), np.empty(0)) for o, rows in lists.items()},
            self.num_owners,
        )
