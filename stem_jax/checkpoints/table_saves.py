"""What a run saves of its tables: all rows, or those that changed since the save before."""

import dataclasses
from typing import Any

from stem_jax.checkpoints.chain import Base, mark_of
from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.files import FORMAT_VERSION
from stem_jax.checkpoints.tables import Stores, copies_of_tables, saved_stores
from stem_jax.memory.catalogue import table_specs
from stem_jax.storage import Place
from stem_jax.tables.disk_store import DiskStore
from stem_jax.tables.spec import TableState
from stem_jax.tables.store_snapshot import StoreSnapshot


@dataclasses.dataclass(frozen=True)
class _Last:
    """The newest save. numbers: of changes behind the whole save of each table, and how its other
    rows are made, or None."""

    step: int
    updates: int
    tables: dict[str, tuple[int, Any]]


class TableSaves:
    """The saves of one work folder, in the order of their steps.

    checkpoints: their folder. full_every: of so many saves one is whole, at least.
    """

    def __init__(self, checkpoints: Place, full_every: int):
        self._checkpoints = checkpoints
        self._full_every = full_every
        self._last: _Last | None = None
        self._next: _Last | None = None
        self._snapshots: dict[str, StoreSnapshot] = {}

    def restored(self, info: CheckpointInfo) -> None:
        """The next save may build on this one, which is what the run goes on from."""
        if info.format < FORMAT_VERSION:
            # Without checksums of its files.
            return
        tables = {
            name: (info.bases[name].number if name in info.bases else 0, info.first_rows.get(name))
            for name in table_specs(info.config)
            if name not in info.disk
        }
        self._last = _Last(info.step, info.updates, tables)

    def begin(
        self, info: CheckpointInfo, tables: dict[str, TableState], stores: Stores
    ) -> tuple[dict[str, Any], dict[str, Base]]:
        """The items of a save, and what those build on that have changes alone.

        Args:
            info: of the save.
            tables: arrays of the memories that have no store.
            stores: see `Checkpointer.save`.
        """
        in_memory = {n: s for n, s in stores.items() if not isinstance(s, DiskStore)}
        copies = copies_of_tables(info.config, tables)
        both = in_memory | copies
        bases = {
            name: base
            for name, store in both.items()
            if (base := self._base(name, store)) is not None
        }
        at = None if self._last is None else self._last.updates
        since = {name: at if name in bases else None for name in both}
        for name, store in in_memory.items():
            self._snapshots[name] = store.snapshot(since[name])
        items = saved_stores(in_memory, self._snapshots)
        # No snapshots to close: nobody writes to copies, which are gone once they are on disk.
        items |= saved_stores(copies, {n: s.snapshot(since[n]) for n, s in copies.items()})
        saved = {n: (bases[n].number if n in bases else 0, s.first) for n, s in both.items()}
        self._next = _Last(info.step, info.updates, saved)
        return items, bases

    def started(self) -> None:
        """The save that began is under way: the next may build on it, once it is done."""
        self._last = self._next

    def failed(self) -> None:
        """The save under way is none: the next has all rows."""
        self._last = None

    def drop_snapshots(self) -> None:
        """Nobody reads the stores for a save any more."""
        for snapshot in self._snapshots.values():
            snapshot.close()
        self._snapshots.clear()

    def _base(self, name: str, store) -> Base | None:
        """What changes of a table would build on; None where all of it is saved."""
        last = self._last
        if last is None or name not in last.tables or store.spec.optimizer == "dense_adamw":
            # Whose rows move with every update.
            return None
        number, first = last.tables[name]
        if number + 1 >= self._full_every or first != store.first:
            return None
        mark = mark_of(self._checkpoints / str(last.step), name)
        return None if mark is None else Base(last.step, number + 1, mark)
