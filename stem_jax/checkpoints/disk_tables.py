"""Tables with rows on disk, at a start: opened where a checkpoint left them, or begun."""

import dataclasses
import json
from collections.abc import Collection, Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from stem_jax.bucket import is_folder
from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.files import FOLDER
from stem_jax.checkpoints.tables import Stores, first_rows, save_name
from stem_jax.errors import InputError
from stem_jax.files import read_json, write_whole
from stem_jax.local_copy import address_of
from stem_jax.storage import is_remote, place
from stem_jax.tables import row_folder
from stem_jax.tables.disk_store import DiskStore, pour
from stem_jax.tables.first_rows import FirstRows
from stem_jax.tables.host_block import local_blocks
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.saved_disk import DiskBlock
from stem_jax.tables.saved_rows import saves_in
from stem_jax.tables.spec import TableSpec

_OWNER = "owner.json"


@dataclasses.dataclass(frozen=True)
class DiskTables:
    """The disk of a run. Nothing is opened before it is asked for.

    mesh: of the run. workdir: of the run, which owns the folders. steps: of its checkpoints. keep:
    checkpoints that are kept beside the best and the one that is being written.
    """

    mesh: Mesh
    workdir: Path
    steps: Collection[int]
    keep: int

    def has(self, spec: TableSpec, info: CheckpointInfo, name: str) -> bool:
        """Whether this process's rows of a memory's checkpoint lie where the run has its disk."""
        if not spec.on_disk or spec.disk is None or name not in info.disk:
            return False
        saved = info.disk[name]
        own = [DiskBlock.of(block) for block in local_blocks(spec, self.mesh)]
        # Another run's saves have the same names.
        return not self._is_anothers(spec) and all(
            block in saved.blocks and saved.name in saves_in(block.folder(spec.disk))
            for block in own
        )

    def reopen(self, spec: TableSpec, info: CheckpointInfo, name: str) -> DiskStore:
        """The table as the checkpoint has it, see `has`.

        Raises:
            InputError: see `DiskStore.reopen`.
        """
        kept = [save_name(step) for step in self.steps]
        store = DiskStore.reopen(
            spec,
            self.mesh,
            first_rows(info, name, spec),
            info.disk[name].name,
            kept,
            self._most_saves,
        )
        self._own(spec)
        return store

    def begin(self, spec: TableSpec, first: FirstRows) -> DiskStore:
        """A table without rows. What a start of this run left there, without a checkpoint, goes.

        Raises:
            InputError: the folder has rows of another run, or that a checkpoint needs.
        """
        needed = {save_name(step) for step in self.steps}
        self._check_owner(spec)
        for folder in self._folders(spec):
            there = saves_in(folder)
            if used := sorted(needed & set(there)):
                raise InputError(
                    f"tables.disk: {folder} has rows that a checkpoint of {self.workdir} needs "
                    f"({', '.join(used)}); give another folder"
                )
        store = DiskStore.begin(spec, self.mesh, first, self._most_saves, replace=True)
        self._own(spec)
        return store

    def moved(self, spec: TableSpec, store: HostStore) -> DiskStore:
        """A table on disk with the rows that a store in memory keeps.

        Raises:
            InputError: see `begin`; the disk is full.
        """
        # Of a store that keeps all rows none is made.
        found = self.begin(spec, store.first or FirstRows.of(spec, jax.random.key(0)))
        try:
            pour(store, found)
        except BaseException:
            found.close()
            raise
        return found

    @property
    def _run(self) -> str:
        """Where it is; in a bucket each process has a copy of its own."""
        found = address_of(self.workdir)
        return str(found if is_remote(found) else found.absolute())

    @property
    def _most_saves(self) -> int:
        return self.keep + 2

    def _folders(self, spec: TableSpec) -> Iterator[Path]:
        for block in local_blocks(spec, self.mesh):
            yield DiskBlock.of(block).folder(spec.disk or "")

    def _check_owner(self, spec: TableSpec) -> None:
        """Refuses rows of another run, however they are partitioned: in the end they would go."""
        whose = self._owner(spec)
        if whose == self._run:
            return
        for folder in next(self._folders(spec)).parent.glob("rows-*"):
            if there := saves_in(folder):
                raise InputError(
                    f"tables.disk: {folder} has rows of {whose or 'another run'} (saves "
                    f"{', '.join(there)}); give another folder, or remove that one first"
                )
            # A run that has no save yet.
            row_folder.lock(folder).release()

    def _is_anothers(self, spec: TableSpec) -> bool:
        """Whether the rows are of another run, that is still there; else it moved to `workdir`."""
        whose = self._owner(spec)
        if whose in (None, self._run):
            return False
        return is_folder(place(whose, "tables.disk") / FOLDER)

    def _owner(self, spec: TableSpec) -> str | None:
        path = next(self._folders(spec)).parent / _OWNER
        return read_json(path).get("workdir") if path.exists() else None

    def _own(self, spec: TableSpec) -> None:
        content = json.dumps({"workdir": self._run})
        write_whole(next(self._folders(spec)).parent / _OWNER, content + "\n")


def moved_to_disk(disk: DiskTables, specs: dict[str, TableSpec], stores: Stores) -> Stores:
    """The stores, those of tables with rows on disk moved there."""
    return {
        name: disk.moved(specs[name], store)
        if specs[name].on_disk and not isinstance(store, DiskStore)
        else store
        for name, store in stores.items()
    }
