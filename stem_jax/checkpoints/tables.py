"""The tables of a checkpoint: their items, from and to stores on the host or arrays on devices.

Items are logical, so that nothing in them depends on the devices: arrays pass through a store.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stem_jax.checkpoints.files import table_items
from stem_jax.checkpoints.store_handler import StoreField, store_args
from stem_jax.config import Config
from stem_jax.memory.catalogue import table_specs
from stem_jax.memory.memory import STEM
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.spec import TableSpec, TableState
from stem_jax.tables.store_snapshot import StoreSnapshot

Stores = dict[str, HostStore]


def needed_items(config: Config) -> list[str]:
    """The items of all tables; of rows that stay as they are, the optimizer keeps nothing."""
    specs = table_specs(config).items()
    return [item for name, spec in specs for item in table_items(name)[: len(spec.fields)]]


def copies_of_tables(config: Config, tables: dict[str, TableState]) -> Stores:
    """What this process saves of arrays; they may change as soon as this returns."""
    specs = table_specs(config)
    return {
        name: HostStore.copy_of(*_placed_as(specs[name], table), vars(table))
        for name, table in tables.items()
    }


def table_targets(
    config: Config, tables: dict[str, TableState], stores: Stores | None
) -> tuple[dict[str, Any], Stores]:
    """Where the items of tables are restored to, and the stores that those without one pass.

    Args:
        config: of the checkpoint.
        tables: abstract arrays. stores: of some of them.
    """
    specs, stores = table_specs(config), stores or {}
    others = {name: table for name, table in tables.items() if name not in stores}
    passing = {
        name: HostStore.zeros(*_placed_as(specs[name], table)) for name, table in others.items()
    }
    return _targets(stores | passing), passing


def tables_on_devices(stores: Stores, tables: dict[str, TableState]) -> dict[str, TableState]:
    """Arrays with the contents of stores, empty after that, placed as abstract ones."""
    return {
        name: TableState(**store.on_devices(_placed(tables[name].rows)[1]))
        for name, store in stores.items()
    }


def saved_stores(stores: Stores, snapshots: dict[str, StoreSnapshot]) -> dict[str, Any]:
    """The items of stores, as they were when the snapshots were taken."""
    items = {}
    for name, store in stores.items():
        fields = {field: StoreField(store, field, snapshots[name]) for field in store.fields}
        rows, moments = table_items(name)
        items[rows] = ocp.args.PyTreeSave({"rows": fields.pop("rows")})
        if fields:
            items[moments] = ocp.args.PyTreeSave(fields)
    return items


def _targets(stores: Stores) -> dict[str, Any]:
    """Items to be restored into stores; of one without moments, its rows alone."""
    items = {}
    for name, store in stores.items():
        fields = {field: StoreField(store, field) for field in store.fields}
        rows, moments = table_items(name)
        items[rows] = store_args({"rows": fields.pop("rows")})
        if fields:
            items[moments] = store_args(fields)
    return items


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
