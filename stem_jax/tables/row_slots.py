"""Which rows lie in the slots of all owners, and how a batch changes that.

Every process keeps the books of every owner, not only of its own: they follow from what the
batches ask for, which all processes know, so all agree on the moves and on their sizes without
another word.
"""

import dataclasses

import numpy as np

from stem_jax.errors import InputError
from stem_jax.tables.asked_rows import AskedRows
from stem_jax.tables.row_cache import Assignment, CacheTooSmall, RowCache
from stem_jax.tables.spec import TableSpec

_SMALLEST_MOVE = 16


class TooFewSlots(InputError):
    """A batch asks for more rows than there are slots; all before it can still be used."""


@dataclasses.dataclass(frozen=True)
class Move:
    """How the rows of a batch become resident; numbers count within an owner's shard.

    assignments: of each owner. size: M, room for the rows that enter a shard. asked, missing: rows
    over all owners. tokens, missing_tokens: their tokens.
    """

    assignments: tuple[Assignment, ...]
    size: int
    asked: int
    missing: int
    tokens: int
    missing_tokens: int

    def slots(self, room: int, slots_per_owner: int) -> np.ndarray:
        """[P, room] int32: slots of the asked rows in their order; past the end fills the rest."""
        table = np.full((len(self.assignments), room), slots_per_owner, np.int32)
        for line, assignment in zip(table, self.assignments, strict=True):
            line[: len(assignment.slots)] = assignment.slots
        return table

    def places(self, slots_per_owner: int) -> np.ndarray:
        """[P, M] int32: slots that rows enter; what fills the rest lies past the end, distinct."""
        outside = slots_per_owner + np.arange(self.size, dtype=np.int32)
        table = np.tile(outside, (len(self.assignments), 1))
        for line, assignment in zip(table, self.assignments, strict=True):
            line[: len(assignment.places)] = assignment.places
        return table


class RowSlots:
    """The caches of all owners of a table."""

    def __init__(self, spec: TableSpec, num_owners: int, policy: str):
        """At first the rows of the lowest keys are resident: the frequent ones, in a vocabulary."""
        self._rows_per_owner = spec.num_rows // num_owners
        self._spec, self._num_slots = spec, spec.num_slots
        self._caches = [
            RowCache(rows, self._rows_per_owner, policy)
            for rows in _of_lowest_keys(spec, num_owners)
        ]

    def held(self, owner: int) -> np.ndarray:
        """[R / P] rows of an owner's shard by slot, a copy."""
        return self._caches[owner].rows.copy()

    def fits(self, asked: AskedRows) -> bool:
        """Whether rows can be resident at a time."""
        return asked.slots_needed <= self._num_slots

    def too_few(self, asked: AskedRows) -> TooFewSlots:
        """The refusal of a batch that does not fit."""
        return TooFewSlots(too_few_slots(self._spec, asked.slots_needed))

    def assign(
        self, asked: AskedRows, pinned: AskedRows | None = None, *, record: bool = True
    ) -> Move:
        """Makes the rows of a batch resident.

        Args:
            asked: by the batch.
            pinned: further rows that must not leave; None for no others.
            record: whether this counts as use of the rows.

        Raises:
            TooFewSlots: names how many would do. Some owners may have made room already: the
                caches are of no use afterwards. See `fits`.
        """
        assignments, missing, missing_tokens = [], 0, 0
        for owner, cache in enumerate(self._caches):
            rows, tokens = asked.rows[owner], asked.tokens[owner]
            stay = None if pinned is None else pinned.rows[owner]
            try:
                found = cache.assign(rows, stay, record)
            except CacheTooSmall as error:
                raise self.too_few(asked if pinned is None else asked.united([pinned])) from error
            assignments.append(found)
            missing += len(found.missing)
            missing_tokens += int(tokens[np.searchsorted(rows, found.missing)].sum())
        return Move(
            tuple(assignments),
            _room(max(len(a.missing) for a in assignments)),
            sum(len(a.slots) for a in assignments),
            missing,
            sum(int(tokens.sum()) for tokens in asked.tokens),
            missing_tokens,
        )


def too_few_slots(spec: TableSpec, needed: int) -> str:
    """The refusal of batches that need more slots than there are, with a number that will do."""
    return (
        f"{spec.resident_key}={spec.num_slots} is less than the rows that one of the batches needs "
        f"at a time; the smallest that works for them is {needed}. Raise it to that or more, or "
        "lower train.global_batch_size"
    )


def _of_lowest_keys(spec: TableSpec, num_owners: int) -> list[np.ndarray]:
    """[R / P] rows of each owner's shard, by rising key, found without looking at all keys."""
    size, resident = spec.num_rows // num_owners, spec.num_slots // num_owners
    if spec.layout.spread:
        # A key is its own row.
        return [np.arange(resident)] * num_owners
    looked_at, fewest = spec.num_slots, 0
    while fewest < resident:
        # Keys fall evenly on the shards: a few more than there are slots fill all of them.
        looked_at = min(spec.num_rows, looked_at + looked_at // 8 + num_owners)
        owners, rows = np.divmod(spec.layout.row_numbers(np.arange(looked_at)), size)
        fewest = np.bincount(owners, minlength=num_owners).min()
    return [rows[owners == owner][:resident] for owner in range(num_owners)]


def _room(size: int) -> int:
    """The next of 16, 20, 24, 28, 32, 40, ...: a program for each, a fifth of padding at most."""
    if size <= _SMALLEST_MOVE:
        return _SMALLEST_MOVE if size else 0
    step = 1 << ((size - 1).bit_length() - 3)
    return -(-size // step) * step
