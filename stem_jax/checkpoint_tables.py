"""The table of a checkpoint: its items, from and to a store on the host or arrays on devices.

Items are logical, so that nothing in them depends on the devices: arrays pass through a store.
"""

import dataclasses
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stem_jax.config import Config
from stem_jax.store_handler import StoreField, store_args
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.spec import TableSpec, TableState
from stem_jax.tables.store_snapshot import StoreSnapshot


def copy_of_table(config: Config, table: TableState) -> HostStore:
    """What this process saves of arrays; they may change as soon as this returns."""
    spec, mesh = _placed_as(config, table)
    return HostStore.copy_of(spec, mesh, vars(table))


def room_for_table(config: Config, table: TableState | None) -> HostStore | None:
    """What the table of a checkpoint is read into on its way to arrays like these abstract ones."""
    return None if table is None else HostStore.zeros(*_placed_as(config, table))


def table_on_devices(store: HostStore | None, table: TableState | None) -> TableState | None:
    """Arrays with the contents of a store, which is empty after that, placed as abstract ones."""
    if store is None or table is None:
        return None
    return TableState(**store.on_devices(_placed(table.rows)[1]))


def saved_store(store: HostStore, snapshot: StoreSnapshot) -> dict[str, Any]:
    """The items of a store, as it was when the snapshot was taken."""
    fields = {name: StoreField(store, name, snapshot) for name in store.fields}
    return {
        "table_rows": ocp.args.PyTreeSave({"rows": fields.pop("rows")}),
        "table_slots": ocp.args.PyTreeSave(fields),
    }


def table_targets(store: HostStore | None) -> dict[str, Any]:
    """Where the items of the table are restored to: a store, or nowhere."""
    if store is None:
        return {}
    fields = {name: StoreField(store, name) for name in store.fields}
    rows, slots = {"rows": fields.pop("rows")}, fields
    items = {"table_rows": store_args(rows), "table_slots": store_args(slots)}
    return items if slots else {"table_rows": items["table_rows"]}


def _placed(array: jax.Array) -> tuple[PartitionSpec, Mesh]:
    # Tables lie on a mesh of devices, always.
    sharding = array.sharding
    assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh), sharding
    return sharding.spec, sharding.mesh


def _placed_as(config: Config, table: TableState) -> tuple[TableSpec, Mesh]:
    """The table of a configuration, on the devices that these arrays are meant for."""
    partition, mesh = _placed(table.last_step)
    axes = partition[0] or ()
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    spec = TableSpec.from_config(config)
    return dataclasses.replace(spec, vocab_axes=axes, resident_rows=None), mesh
