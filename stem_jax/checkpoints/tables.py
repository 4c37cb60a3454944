"""The tables of a checkpoint: their items, from and to stores on the host or arrays on devices.

Items are logical, so that nothing in them depends on the devices: arrays pass through a store.
"""

import dataclasses
import functools
import json
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.items import table_items
from stem_jax.checkpoints.made_arrays import MadeArray
from stem_jax.checkpoints.store_handler import StoreField, few_rows_of, store_args
from stem_jax.config import Config
from stem_jax.memory.catalogue import table_specs
from stem_jax.memory.memory import STEM, prefix
from stem_jax.processes.agreement import exchange
from stem_jax.tables.disk_store import DiskStore
from stem_jax.tables.first_rows import FirstRows
from stem_jax.tables.host_memory import available_host_bytes, check_host_memory
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.saved_disk import DiskBlock, SavedDisk, pour_saved
from stem_jax.tables.spec import TableSpec, TableState
from stem_jax.tables.store_snapshot import NUMBERS, StoreSnapshot
from stem_jax.training.state import table_key

Stores = dict[str, HostStore]


def needed_items(config: Config, disk: Container[str] = ()) -> list[str]:
    """The items of all tables; of rows that stay as they are, the optimizer keeps nothing.

    disk: memories whose rows are on disk.
    """
    specs = {name: spec for name, spec in table_specs(config).items() if name not in disk}
    return [item for name, spec in specs.items() for item in table_items(name)[: len(spec.fields)]]


def copies_of_tables(config: Config, tables: dict[str, TableState]) -> Stores:
    """What this process saves of arrays; they may change as soon as this returns."""
    specs = table_specs(config)
    return {
        name: HostStore.copy_of(*_placed_as(specs[name], table), vars(table))
        for name, table in tables.items()
    }


def table_targets(
    info: CheckpointInfo, tables: dict[str, TableState], stores: Stores | None
) -> tuple[Stores, Stores]:
    """The stores that the items of tables are restored to, and those among them that only pass.

    Rows that a checkpoint has on disk are read now, into the stores that are in memory.

    Args:
        info: of the checkpoint.
        tables: abstract arrays.
        stores: of some of them.
    """
    specs, stores = table_specs(info.config), stores or {}
    others = {name: table for name, table in tables.items() if name not in stores}
    passing = {
        name: HostStore.zeros(*_placed_as(specs[name], table)) for name, table in others.items()
    }
    targets = {}
    for name, store in (stores | passing).items():
        if isinstance(store, DiskStore):
            # As it was saved, see `stores_for`.
            continue
        if name not in info.first_rows:
            store.keep_all()
        elif store.first is None:
            store.fill(info.first_rows[name])
        if name in info.disk:
            pour_saved(specs[name], info.disk[name], store)
        else:
            targets[name] = store
    return targets, passing


def stores_for(info: CheckpointInfo, specs: dict[str, TableSpec], mesh: Mesh) -> Stores:
    """Stores of offloaded tables, in memory, for the items of a checkpoint to be read into.

    Args:
        info: of the checkpoint.
        specs: of the tables.
        mesh: where their device side lies.

    Raises:
        InputError: the host has too little memory.
    """
    stores = {}
    for name, spec in specs.items():
        if not spec.offloaded:
            continue
        if not spec.made_when_asked and name not in info.first_rows:
            stores[name] = HostStore.allocate(spec, mesh)
            continue
        spec = dataclasses.replace(spec, host_rows=None)
        # Beside the touched ones, those that slots began with.
        some = min(spec.num_rows, info.touched_rows[name] + spec.num_slots)
        needed = HostStore.peak_bytes(spec, mesh, some if name in info.first_rows else None)
        check_host_memory(needed, available_host_bytes(), specs=[spec])
        stores[name] = HostStore.empty(spec, mesh, first_rows(info, name, spec))
    return stores


def first_rows(info: CheckpointInfo, name: str, spec: TableSpec) -> FirstRows:
    """How the rows of a memory are made that its checkpoint has not."""
    return info.first_rows.get(name) or FirstRows.of(spec, table_key(info.config, name))


def tables_on_devices(stores: Stores, tables: dict[str, TableState]) -> dict[str, TableState]:
    """Arrays with the contents of stores, empty after that, placed as abstract ones."""
    return {
        name: TableState(**store.on_devices(_placed(tables[name].rows)[1]))
        for name, store in stores.items()
    }


def save_name(step: int) -> str:
    """Of the rows on disk that the checkpoint of a step has."""
    return f"step-{step}"


def saved_disks(stores: Stores, step: int) -> dict[str, Any]:
    """Saves the rows of stores on disk, in every process; the record of it for the checkpoint.

    Raises:
        InputError: the disk is full in one of the processes.
    """
    disks = {name: store for name, store in stores.items() if isinstance(store, DiskStore)}
    if not disks:
        return {}

    def own_part() -> bytes:
        blocks = {}
        for name, store in disks.items():
            store.save(save_name(step))
            saved = [DiskBlock.of(b).noted(_disk(store), save_name(step)) for b in store.blocks]
            blocks[name] = [dataclasses.asdict(block) for block in saved]
        return json.dumps(blocks).encode()

    parts = [json.loads(part) for part in exchange(own_part)]
    return {
        f"{prefix(name)}_disk": {
            "folder": str(_disk(store)),
            "name": save_name(step),
            "blocks": [block for part in parts for block in part[name]],
        }
        for name, store in disks.items()
    }


def _disk(store: DiskStore) -> Path:
    return Path(store.spec.disk or "").absolute()


def disks_of(record: dict[str, Any], names: Iterable[str]) -> dict[str, SavedDisk]:
    """The reverse, of those of these memories that have rows on disk."""
    found = {name: record.get(f"{prefix(name)}_disk") for name in names}
    return {name: SavedDisk.from_record(disk) for name, disk in found.items() if disk is not None}


def saved_stores(stores: Stores, snapshots: dict[str, StoreSnapshot]) -> dict[str, Any]:
    """The items of stores, as they were when the snapshots were taken."""
    some = {name: store for name, store in stores.items() if snapshots[name].some}
    rooms = _rooms(some, snapshots)
    items: dict[str, Any] = {}
    for name, store in stores.items():
        leaf = functools.partial(StoreField, store, snapshot=snapshots[name], room=rooms.get(name))
        items |= _items(store, name, name in some, leaf, ocp.args.PyTreeSave)
    return items


def made_items(made: Mapping[str, Mapping[str, MadeArray]]) -> dict[str, Any]:
    """The items of tables whose fields are made as they are written."""
    items: dict[str, Any] = {}
    for name, fields in made.items():
        rows, moments = table_items(name)
        others = {field: array for field, array in fields.items() if field != "rows"}
        items[rows] = ocp.args.PyTreeSave({"rows": fields["rows"]})
        if others:
            items[moments] = ocp.args.PyTreeSave(others)
    return items


def restored_items(stores: Stores, info: CheckpointInfo) -> dict[str, Any]:
    """Items of a checkpoint to be restored into stores; of one without moments, its rows alone."""
    items: dict[str, Any] = {}
    for name, store in stores.items():
        leaf = functools.partial(StoreField, store)
        some = name in info.first_rows or name in info.bases
        items |= _items(store, name, some, leaf, store_args)
    return items


def _items(store: HostStore, name: str, some: bool, leaf, item) -> dict[str, Any]:
    """The items of a table, each with the numbers of its rows where they are `some` of them."""
    numbers = {NUMBERS: leaf(NUMBERS)} if some else {}
    fields = {field: leaf(field) for field in store.fields}
    rows, moments = table_items(name)
    items = {rows: item({"rows": fields.pop("rows"), **numbers})}
    if fields:
        items[moments] = item({**fields, **numbers})
    return items


def _rooms(stores: Stores, snapshots: dict[str, StoreSnapshot]) -> dict[str, int]:
    """Room for the rows that the fullest shard of any process keeps, by memory: whole chunks."""
    if not stores:
        return {}
    counts = {name: snapshots[name].count for name in stores}
    parts = [json.loads(part) for part in exchange(lambda: json.dumps(counts).encode())]
    rooms = {}
    for name, store in stores.items():
        most, chunk = max(1, *(part[name] for part in parts)), few_rows_of(store)
        rooms[name] = most if most <= chunk else -(-most // chunk) * chunk
    return rooms


def touched_record(touched_rows: dict[str, int]) -> dict[str, int]:
    """In the record of a checkpoint, which has an entry for STEM's also where there are none."""
    others = {f"{name}_touched_rows": n for name, n in touched_rows.items() if name != STEM}
    return {"touched_rows": touched_rows.get(STEM, 0), **others}


def touched_rows_of(record: dict[str, Any], names: Iterable[str]) -> dict[str, int]:
    """The reverse, of these memories; takes the entries out."""
    stem = record.pop("touched_rows")
    return {n: stem if n == STEM else record.pop(f"{n}_touched_rows") for n in names}


def table_layouts(config: Config) -> dict[str, int]:
    """Where the rows of each table are, in the record of a checkpoint."""
    found = {}
    for name, spec in table_specs(config).items():
        begin = "" if name == STEM else f"{name}_"
        found[f"{begin}num_rows"] = spec.num_rows
        found[f"{begin}multiplier"] = spec.layout.multiplier
    return found


def first_rows_record(stores: Stores) -> dict[str, Any]:
    """In the record of a checkpoint: how the rows are made that stores do not keep."""
    return {
        f"{prefix(name)}_first_rows": store.first.record()
        for name, store in stores.items()
        if store.first is not None
    }


def first_rows_of(record: dict[str, Any], names: Iterable[str]) -> dict[str, FirstRows]:
    """The reverse, of those of these memories of which there are some rows alone."""
    found = {name: record.get(f"{prefix(name)}_first_rows") for name in names}
    return {
        name: FirstRows.from_record(first) for name, first in found.items() if first is not None
    }


def _placed(array: jax.Array) -> tuple[PartitionSpec, Mesh]:
    # Tables lie on a mesh of devices, always.
    sharding = array.sharding
    assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh), sharding
    return sharding.spec, sharding.mesh


def _placed_as(spec: TableSpec, table: TableState) -> tuple[TableSpec, Mesh]:
    """The table of a specification, on the devices that these arrays are meant for."""
    partition, mesh = _placed(table.rows)
    axes = partition[1] or ()
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    return dataclasses.replace(spec, vocab_axes=axes, resident_rows=None), mesh
