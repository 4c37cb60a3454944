"""What reads and writes the items of a checkpoint that have arrays, by what their leaves are."""

from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from stem_jax.checkpoints.checksums import listed
from stem_jax.checkpoints.items import table_items
from stem_jax.checkpoints.made_arrays import MadeArray, MadeArrayHandler
from stem_jax.checkpoints.store_handler import StoreField, StoreFieldHandler
from stem_jax.memory.catalogue import MEMORIES


def item_handlers() -> ocp.DefaultCheckpointHandlerRegistry:
    """The handlers by item: of tables those that take stores; each process lists what it wrote."""
    registry = ocp.DefaultCheckpointHandlerRegistry()
    for item in (item for name in MEMORIES for item in table_items(name)):
        handler = listed(_tree_handler())
        registry.add(item, ocp.args.PyTreeSave, handler)
        registry.add(item, ocp.args.PyTreeRestore, handler)
    for item in ("params", "opt_state"):
        registry.add(item, ocp.args.PyTreeSave, listed(_tree_handler()))
        handler = listed(ocp.StandardCheckpointHandler())
        registry.add(item, ocp.args.StandardSave, handler)
        registry.add(item, ocp.args.StandardRestore, handler)
    return registry


def save_args(tree: dict[str, Any]) -> ocp.args.CheckpointArgs:
    """Saves parameters, or what their optimizer keeps: jax.Arrays, or made arrays."""
    made = any(isinstance(leaf, MadeArray) for leaf in tree.values())
    return ocp.args.PyTreeSave(tree) if made else ocp.args.StandardSave(tree)


def _tree_handler() -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=type_handlers.create_type_handler_registry(
            (jax.Array, type_handlers.get_type_handler(jax.Array)),
            (StoreField, StoreFieldHandler()),
            (MadeArray, MadeArrayHandler()),
        )
    )
