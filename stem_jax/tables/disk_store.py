"""A table in host memory and on disk: memory has room for some rows, the disk for all others.

Each block of this process has a folder of its own, see `saved_disk`. A save keeps all rows as they
are under a name, at a cost that follows what changed; a checkpoint notes the name. What no
checkpoint notes any more is dropped.
"""

import dataclasses
import math
import shutil
from collections.abc import Collection, Iterator

import numpy as np
from jax.sharding import Mesh

from stem_jax.tables.disk_space import needed_bytes
from stem_jax.tables.first_rows import FirstRows
from stem_jax.tables.host_block import Arrays, HostBlock, local_blocks
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.row_file import RowFile
from stem_jax.tables.row_tiers import RowTiers, TierCounts
from stem_jax.tables.saved_disk import DiskBlock, SavedDisk, SavedTier
from stem_jax.tables.spec import TableSpec
from stem_jax.tables.store_snapshot import StoreSnapshot

# Rows that are read from disk, or poured into it, at a time.
_PIECE_ROWS = 2**14


class DiskStore(HostStore):
    """This process's part of a table, of which `host_rows` are in memory. Close it."""

    def __init__(self, spec: TableSpec, blocks: tuple[HostBlock, ...], first: FirstRows):
        """Use `create` or `reopen`."""
        super().__init__(spec, blocks, first)
        self._last = TierCounts()

    @classmethod
    def begin(
        cls, spec: TableSpec, mesh: Mesh, first: FirstRows, most_saves: int, *, replace: bool
    ) -> "DiskStore":
        """A store that has no row yet.

        Args:
            spec: the table; its `disk` is the folder.
            mesh: where the device side lies.
            first: how rows are made.
            most_saves: that are kept at a time.
            replace: whatever saves the folder has are dropped.

        Raises:
            InputError: another run has the folder, it has saves, or it cannot be written.
        """

        def file(block: DiskBlock) -> RowFile:
            layout = block.layout(spec, _disk(spec))
            return RowFile.create(*layout, most_saves=most_saves, replace=replace)

        return cls(spec, _blocks_on(spec, mesh, file), first)

    @classmethod
    def reopen(
        cls,
        spec: TableSpec,
        mesh: Mesh,
        first: FirstRows,
        save: str,
        kept: Collection[str],
        most_saves: int,
    ) -> "DiskStore":
        """A store as it was when it was saved.

        Args:
            save: its name.
            kept: other saves that stay.
            spec, mesh, first, most_saves: see `begin`.

        Raises:
            InputError: another run has the folder, its rows are of another layout, there is no such
                save, or a file of it is torn.
        """

        def file(block: DiskBlock) -> RowFile:
            layout = block.layout(spec, _disk(spec))
            return RowFile.open(*layout, save, keep=kept, most_saves=most_saves)

        return cls(spec, _blocks_on(spec, mesh, file), first)

    @classmethod
    def to_read(
        cls, spec: TableSpec, mesh: Mesh, first: FirstRows, saved: SavedDisk
    ) -> "DiskStore":
        """The rows of a save, read as they are asked for; nothing can be written.

        Args:
            saved: where it lies, however it is partitioned.
            spec, mesh, first: see `begin`.

        Raises:
            InputError: there is no such save, or one of another layout.
        """
        return cls(spec, _blocks(spec, mesh, lambda block: SavedTier(spec, saved, block)), first)

    @staticmethod
    def disk_bytes_needed(spec: TableSpec, mesh: Mesh, rows: int, saves: int) -> int:
        """Bytes of disk that this process's part of a table takes at most.

        Args:
            rows: of the whole table that are written at most.
            saves: that are kept at a time.
        """
        total = 0
        for block in local_blocks(spec, mesh):
            own = math.ceil(min(1.0, rows / spec.num_rows) * len(block.row_range))
            total += needed_bytes(DiskBlock.of(block).record(spec).size, own, saves)
        return total

    @staticmethod
    def disk_bytes_taken(spec: TableSpec, mesh: Mesh) -> int:
        """Bytes that its folders take already."""
        folders = [DiskBlock.of(block).folder(_disk(spec)) for block in local_blocks(spec, mesh)]
        files = (path for folder in folders for path in folder.glob("**/*") if path.is_file())
        return sum(path.stat().st_blocks * 512 for path in files)

    def snapshot(self, since: int | None = None) -> StoreSnapshot:
        """Rows on disk are saved where they are."""
        raise RuntimeError("a store on disk has no snapshots; use save")

    def save(self, name: str) -> None:
        """Keeps all rows as they are now; they are on the disk when it returns.

        Raises:
            InputError: the disk is full; earlier saves stay usable.
        """
        for tiers in self._tiers():
            tiers.save(name)

    def keep(self, names: Collection[str]) -> None:
        """Drops all saves but these, in folders of other partitions of the table too."""
        for tiers in self._tiers():
            tiers.file.kept(names)
        own = {DiskBlock.of(block).folder(_disk(self.spec)) for block in self.blocks}
        for folder in next(iter(own)).parent.glob("rows-*"):
            saves = {path.stem for path in folder.glob("saves/*.json")}
            if folder not in own and not saves & set(names):
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def disk_bytes(self) -> int:
        """That this process's folders take."""
        return sum(tiers.file.num_bytes for tiers in self._tiers())

    def take_counts(self) -> dict[str, int]:
        """Rows since the last call, by the tier that they came from; bytes on disk."""
        now = TierCounts()
        for tiers in self._tiers():
            for name, count in vars(tiers.counts).items():
                setattr(now, name, getattr(now, name) + count)
        last, self._last = vars(self._last), now
        since = {name: count - last[name] for name, count in vars(now).items()}
        return {
            "host_rows_read": since["from_memory"],
            "disk_rows_read": since["from_disk"],
            "rows_made": since["made"],
            "disk_rows_written": since["evicted"] + since["saved"],
            "disk_bytes": self.disk_bytes,
        }

    def close(self) -> None:
        """Gives the folders back; what was written since the last save is lost."""
        for block in self.blocks:
            if isinstance(block.tier, RowTiers):
                block.tier.file.close()
            elif isinstance(block.tier, SavedTier):
                block.tier.close()

    def _tiers(self) -> Iterator[RowTiers]:
        for block in self.blocks:
            assert isinstance(block.tier, RowTiers), "the store is there to be read"
            yield block.tier


def pour(store: HostStore, into: HostStore) -> None:
    """Writes all rows that a store in memory keeps to another of the same blocks."""
    for block, target in zip(store.blocks, into.blocks, strict=True):
        for first in range(0, block.count, _PIECE_ROWS):
            part = slice(first, min(first + _PIECE_ROWS, block.count))
            rows = np.arange(part.start, part.stop)
            if block.kept is not None:
                rows = block.kept.numbers[part].astype(np.int64)
            into.write(target, rows, {name: array[part] for name, array in block.arrays.items()})


def _blocks_on(spec: TableSpec, mesh: Mesh, file) -> tuple[HostBlock, ...]:
    opened: list[RowFile] = []

    def tier(block: HostBlock) -> RowTiers:
        opened.append(file(DiskBlock.of(block)))
        assert spec.host_rows is not None, "some rows are on disk"
        share = len(block.row_range) / spec.num_rows
        return RowTiers(opened[-1], max(1, round(spec.host_rows * share)))

    try:
        return _blocks(spec, mesh, tier)
    except BaseException:
        for one in opened:
            one.close()
        raise


def _blocks(spec: TableSpec, mesh: Mesh, tier) -> tuple[HostBlock, ...]:
    blocks = []
    for block in local_blocks(spec, mesh):
        columns = len(block.column_range)
        # None of the rows: shapes and dtypes for who makes buffers.
        arrays: Arrays = {
            f.name: np.zeros(spec.shape(f.name, 0, columns), f.dtype) for f in spec.fields
        }
        blocks.append(dataclasses.replace(block, arrays=arrays, tier=tier(block)))
    return tuple(blocks)


def _disk(spec: TableSpec) -> str:
    assert spec.disk is not None, "tables.host_rows needs tables.disk"
    return spec.disk
