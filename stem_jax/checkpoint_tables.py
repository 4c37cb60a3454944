"""The table of a checkpoint: its items, from and to arrays on devices or a store on the host."""

from typing import Any

import orbax.checkpoint as ocp

from stem_jax.store_handler import StoreField, store_args
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.spec import TableState
from stem_jax.tables.store_snapshot import StoreSnapshot

# Arrays of the table on disk are cut into values of this size, so that a part can be read alone.
_CHUNK_BYTES = 2**24


def saved_table(table: TableState) -> dict[str, Any]:
    """The items of arrays."""

    def chunked(item):
        cut = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in item}
        return ocp.args.PyTreeSave(item, save_args=cut)

    slots = {"mu": table.mu, "nu": table.nu, "last_step": table.last_step}
    return {"table_rows": chunked({"rows": table.rows}), "table_slots": chunked(slots)}


def saved_store(store: HostStore, snapshot: StoreSnapshot) -> dict[str, Any]:
    """The items of a store, as it was when the snapshot was taken."""
    fields = {name: StoreField(store, name, snapshot) for name in store.fields}
    return {
        "table_rows": ocp.args.PyTreeSave({"rows": fields.pop("rows")}),
        "table_slots": ocp.args.PyTreeSave(fields),
    }


def table_targets(table: TableState | None, store: HostStore | None) -> dict[str, Any]:
    """Where the items of the table are restored to: a store, arrays, or nowhere."""
    if store is not None:
        fields = {name: StoreField(store, name) for name in store.fields}
        rows, slots = {"rows": fields.pop("rows")}, fields
        items = {"table_rows": store_args(rows), "table_slots": store_args(slots)}
        return items if slots else {"table_rows": items["table_rows"]}
    if table is None:
        return {}

    def arrays(item):
        args = ocp.checkpoint_utils.construct_restore_args(item)
        return ocp.args.PyTreeRestore(item, restore_args=args)

    slots = {"mu": table.mu, "nu": table.nu, "last_step": table.last_step}
    return {"table_rows": arrays({"rows": table.rows}), "table_slots": arrays(slots)}


def restored_table(found) -> TableState:
    """The arrays of the items that were restored."""
    return TableState(rows=found["table_rows"]["rows"], **found["table_slots"])
