"""Which rows lie in the slots of the owners that a process holds, and how a batch changes that.

A process keeps the books of its own owners, and hears of nothing but what these are asked for.
Which rows leave, and how many, is no one else's business: a swap is a program of its own devices.
Owners that the same processes hold are decided on together, so that copies of a shard stay alike.
"""

import dataclasses
from collections.abc import Collection, Sequence

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

    assignments: by owner of this process. size: M, room for the rows that enter one of its shards.
    asked, missing: rows over these owners. tokens, missing_tokens: their tokens.
    """

    assignments: dict[int, Assignment]
    size: int
    asked: int
    missing: int
    tokens: int
    missing_tokens: int

    def slots(self, owner: int, room: int, slots_per_owner: int) -> np.ndarray:
        """[room] int32: slots of the asked rows in their order; past the end fills the rest."""
        line = np.full(room, slots_per_owner, np.int32)
        found = self.assignments[owner].slots
        line[: len(found)] = found
        return line

    def places(self, owner: int, slots_per_owner: int) -> np.ndarray:
        """[M] int32: slots that rows enter; what fills the rest lies past the end, distinct."""
        line = slots_per_owner + np.arange(self.size, dtype=np.int32)
        found = self.assignments[owner].places
        line[: len(found)] = found
        return line


class RowSlots:
    """The caches of the owners of a table that this process holds."""

    def __init__(
        self,
        spec: TableSpec,
        num_owners: int,
        policy: str,
        groups: Sequence[Collection[int]] | None = None,
    ):
        """At first the rows of the lowest keys are resident: the frequent ones, in a vocabulary.

        Args:
            num_owners: of the whole table.
            groups: this process's owners, those together that the same processes hold; all owners
                if it is not given.
        """
        self._groups = [range(num_owners)] if groups is None else groups
        self._spec, self._num_slots = spec, spec.num_slots
        own = [owner for group in self._groups for owner in group]
        rows_per_owner = spec.num_rows // num_owners
        self._caches = {
            owner: RowCache(rows, rows_per_owner, policy)
            for owner, rows in _of_lowest_keys(spec, num_owners, own).items()
        }

    @property
    def owners(self) -> list[int]:
        """Those of which there are books."""
        return list(self._caches)

    def held(self, owner: int) -> np.ndarray:
        """[R / P] rows of an owner's shard by slot, a copy."""
        return self._caches[owner].rows.copy()

    def fits(self, asked: AskedRows) -> bool:
        """Whether rows can be resident at a time."""
        return asked.slots_needed <= self._num_slots

    def too_few(self, asked: AskedRows) -> TooFewSlots:
        """The refusal of a batch that does not fit."""
        return TooFewSlots(too_few_slots(self._spec, asked.slots_needed))

    def staying(self, asked: AskedRows, before: Sequence[AskedRows]) -> AskedRows:
        """Rows of the batches before one that stay when its own come: of the latest, if they fit.

        Args:
            before: batches in flight, the latest last.
        """
        stay: dict[int, np.ndarray] = {}
        for group in self._groups:
            mine = asked.of_owners(group)
            kept = [one.of_owners(group) for one in before]
            # Those of the earliest are the first that are used no more.
            while kept and not self.fits(mine.united(kept)):
                kept.pop(0)
            if kept:
                stay |= kept[0].united(kept[1:]).rows
        return AskedRows.of({o: (rows, np.empty(0)) for o, rows in stay.items()}, asked.num_owners)

    def assign(
        self, asked: AskedRows, pinned: AskedRows | None = None, *, record: bool = True
    ) -> Move:
        """Makes the rows of a batch resident.

        Args:
            asked: by the batch.
            pinned: further rows that must not leave, of some of the owners; None for no others.
            record: whether this counts as use of the rows.

        Raises:
            TooFewSlots: names how many would do. Some owners may have made room already: the
                caches are of no use afterwards. See `fits`.
        """
        assignments, missing, missing_tokens = {}, 0, 0
        for owner, cache in self._caches.items():
            rows, tokens = asked.rows[owner], asked.tokens[owner]
            stay = None if pinned is None else pinned.rows.get(owner)
            try:
                found = cache.assign(rows, stay, record)
            except CacheTooSmall as error:
                raise self.too_few(asked if pinned is None else asked.united([pinned])) from error
            assignments[owner] = found
            missing += len(found.missing)
            missing_tokens += int(tokens[np.searchsorted(rows, found.missing)].sum())
        return Move(
            assignments,
            _room(max(len(a.missing) for a in assignments.values())),
            sum(len(a.slots) for a in assignments.values()),
            missing,
            sum(int(asked.tokens[owner].sum()) for owner in assignments),
            missing_tokens,
        )


def too_few_slots(spec: TableSpec, needed: int) -> str:
    """The refusal of batches that need more slots than there are, with a number that will do."""
    return (
        f"{spec.resident_key}={spec.num_slots} is less than the rows that one of the batches needs "
        f"at a time; the smallest that works for them is {needed}. Raise it to that or more, or "
        "lower train.global_batch_size"
    )


def _of_lowest_keys(
    spec: TableSpec, num_owners: int, own: Collection[int]
) -> dict[int, np.ndarray]:
    """[R / P] rows of the shards of some owners, by rising key, without looking at all keys."""
    size, resident = spec.num_rows // num_owners, spec.num_slots // num_owners
    if spec.layout.spread:
        # A key is its own row.
        return {owner: np.arange(resident) for owner in own}
    looked_at, fewest = spec.num_slots, 0
    while fewest < resident:
        # Keys fall evenly on the shards: a few more than there are slots fill all of them.
        looked_at = min(spec.num_rows, looked_at + looked_at // 8 + num_owners)
        owners, rows = np.divmod(spec.layout.row_numbers(np.arange(looked_at)), size)
        fewest = np.bincount(owners, minlength=num_owners).min()
    return {owner: rows[owners == owner][:resident] for owner in own}


def move_sizes(most_rows: int) -> list[int]:
    """The rooms of all moves of up to so many rows."""
    return sorted({_room(size) for size in range(1, most_rows + 1)})


def _room(size: int) -> int:
    """The next of 16, 20, 24, 28, 32, 40, ...: a program for each, a fifth of padding at most."""
    if size <= _SMALLEST_MOVE:
        return _SMALLEST_MOVE if size else 0
    step = 1 << ((size - 1).bit_length() - 3)
    return -(-size // step) * step
