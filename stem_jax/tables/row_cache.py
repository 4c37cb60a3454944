"""Which row of a table shard lies in which slot on the device, and which rows make room.

Every slot always holds a row: a row that enters takes the place of one that leaves, so a row lies
in exactly one place, in a slot or on the host. With 3 slots that hold rows 4 0 7, a batch of rows 2
and 4 finds row 4 in slot 0 and evicts row 0 or 7 for row 2, the one that the policy values less.

A policy is only how the scores of the asked rows grow; the rows of the smallest scores make room.
A row on the host keeps its score, so that it has its history when it comes back. The books hold all
rows of a table up to 16 times the slots. Of a larger one they hold at least four times as many rows
as there are slots; when they are full, half are forgotten: those on the host of the smallest
scores. Which rows leave depends on nothing but what was asked, in which order.
"""

import dataclasses

import numpy as np

from stem_jax.tables.row_index import RowIndex

POLICIES = ("lfu", "lru")

# Recorded batches after which a request counts half. On text that stays the same longer is better,
# on text that changes shorter: 128 stays within 1.0 points of the best hit rate by row in every
# stream of `benchmarks.cache_policies`, 32 within 3.5 and no aging within 3.1.
HALF_LIFE = 128
# Scores are scaled down long before they could leave the range of float64, 2^1024.
_LARGEST_WORTH = 2.0**512
_NOT_RESIDENT = -1


class CacheTooSmall(Exception):
    """A batch, with the rows that must stay, needs more slots than there are.

    Attributes:
        needed: the distinct rows in `rows` and `pinned` together: with as many slots the batch
            fits whatever is resident, with fewer it does not while the pinned rows are resident.
    """

    def __init__(self, needed: int, num_slots: int):
        super().__init__(f"{needed} rows are needed at a time, but there are {num_slots} slots")
        self.needed = needed


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Where the rows of a batch lie, and which rows change places for that.

    missing[i] enters the slot places[i], which evicted[i] leaves; both come in rising order.

    Attributes:
        slots: [n] int32, slot of each asked row, in the order asked.
        missing: [m] int64, asked rows that were not resident.
        places: [m] int32, the slots that are freed for them.
        evicted: [m] int64, the rows that held those slots so far.
    """

    slots: np.ndarray
    missing: np.ndarray
    places: np.ndarray
    evicted: np.ndarray


class RowCache:
    """The slots of one table shard.

    Policies, by the score of a row:
        lfu: how many batches asked for it, each counted half as much after `HALF_LIFE` more.
        lru: the number of the last batch that asked for it.
    """

    def __init__(
        self,
        resident: np.ndarray,
        num_rows: int,
        policy: str = "lfu",
        half_life: float = HALF_LIFE,
    ):
        """resident: [R] distinct rows in [0, num_rows); slot i holds resident[i] at first.

        num_rows: rows of the shard, resident or not.
        half_life: in recorded batches; only lfu reads it.
        """
        if policy not in POLICIES:
            raise ValueError(
                f"cache policy {policy!r} is unknown: use one of {', '.join(POLICIES)}"
            )
        self._rows = np.array(resident, np.int64)
        self._index = RowIndex(num_rows, self.num_slots)
        # By place in the index; the last is of rows that have none.
        self._slots = np.full(self._index.size + 1, _NOT_RESIDENT, np.int32)
        self._scores = np.zeros(self._index.size + 1)
        self._places = self._index.add(self._rows).copy()  # of the row in each slot
        self._slots[self._places] = np.arange(self.num_slots, dtype=np.int32)
        self._policy = policy
        self._worth = 1.0  # of a request in the next recorded batch
        self._growth = 2.0 ** (1.0 / half_life)

    @property
    def num_slots(self) -> int:
        """R: the rows that are resident at a time."""
        return len(self._rows)

    @property
    def rows(self) -> np.ndarray:
        """[R] int64, the row in each slot; a read-only view that changes with `assign`."""
        view = self._rows.view()
        view.flags.writeable = False
        return view

    def assign(
        self, rows: np.ndarray, pinned: np.ndarray | None = None, record: bool = True
    ) -> Assignment:
        """Makes rows resident.

        rows: [n] distinct rows of a batch, rising, in [0, num_rows). None of them is evicted.
        pinned: [p] further rows in [0, num_rows), in any order, that must not be evicted: those of
            the other batches in flight. Those that are not resident have nothing to lose.
        record: whether this counts as use; evaluation should not change what training keeps.

        Raises CacheTooSmall, with everything as it was, if too few slots may be freed.
        """
        rows = np.asarray(rows, np.int64)
        pinned = np.empty(0, np.int64) if pinned is None else np.asarray(pinned, np.int64)
        known, ends = self._index.look(rows)
        slots = self._slots[known]
        absent = slots == _NOT_RESIDENT
        missing = rows[absent]
        places = self._choose_places(len(missing), slots[~absent], pinned)
        if places is None:
            raise CacheTooSmall(len(np.union1d(rows, pinned)), self.num_slots)
        evicted = self._rows[places]
        entered, ends = known[absent], ends[absent]
        if not self._index.has_room(len(missing)):
            self._forget()
            entered, ends = self._index.look(missing)
        unknown = entered == self._index.absent
        entered[unknown] = self._index.add(missing[unknown], ends[unknown])
        self._slots[self._places[places]] = _NOT_RESIDENT
        self._places[places] = entered
        self._slots[self._places[places]] = places
        self._rows[places] = missing
        slots[absent] = places
        if record:
            self._record(self._places[slots])
        return Assignment(slots=slots, missing=missing, places=places, evicted=evicted)

    def _choose_places(self, count: int, held: np.ndarray, pinned: np.ndarray) -> np.ndarray | None:
        """[count] int32 slots to free, rising by their rows; None if there are not so many.

        held: slots that stay. pinned: rows that stay if they are resident.
        """
        if not count:
            return np.empty(0, np.int32)
        stays = np.zeros(self.num_slots, bool)
        stays[held] = True
        pinned_slots = self._slots[self._index.find(pinned)]
        stays[pinned_slots[pinned_slots != _NOT_RESIDENT]] = True
        free = np.flatnonzero(~stays)
        if count > len(free):
            return None
        rows = self._rows[free]
        leaving = _least(self._scores[self._places[free]], rows, count)
        leaving = leaving[np.argsort(rows[leaving])]
        return free[leaving].astype(np.int32)

    def _forget(self) -> None:
        """Makes room in the index: of the rows on the host, those of the largest scores stay."""
        rows, places = self._index.known()
        away = np.flatnonzero(self._slots[places] == _NOT_RESIDENT)
        leaving = _least(self._scores[places[away]], rows[away], len(rows) - self._index.most // 2)
        stays = np.ones(len(rows), bool)
        stays[away[leaving]] = False
        rows, places = rows[stays], places[stays]
        slots, scores = self._slots[places], self._scores[places]
        self._index.clear()
        self._slots[:] = _NOT_RESIDENT
        self._scores[:] = 0
        places = self._index.add(rows)
        self._slots[places], self._scores[places] = slots, scores
        self._places = self._index.find(self._rows)

    def _record(self, places: np.ndarray) -> None:
        """Counts a request for the rows that have these places."""
        if self._policy == "lru":
            self._scores[places] = self._worth
            self._worth += 1
            return
        # New requests being worth more is old ones being worth less, without touching all scores.
        self._scores[places] += self._worth
        self._worth *= self._growth
        if self._worth > _LARGEST_WORTH:
            self._scores /= self._worth
            self._worth = 1.0


def _least(scores: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """[count] which scores are the smallest, in any order.

    Of equal scores those of lower rows, so that which rows go does not depend on slots.
    """
    last = np.partition(scores, count - 1)[count - 1]
    found = np.flatnonzero(scores < last)
    equal = np.flatnonzero(scores == last)
    left = count - len(found)
    return np.concatenate([found, equal[np.argpartition(rows[equal], left - 1)[:left]]])
