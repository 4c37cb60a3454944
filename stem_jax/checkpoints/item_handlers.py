"""What reads and writes the items of a checkpoint that have arrays."""

import orbax.checkpoint as ocp

from stem_jax.checkpoints.checksums import listed
from stem_jax.checkpoints.files import table_items
from stem_jax.checkpoints.store_handler import table_handler
from stem_jax.memory.catalogue import MEMORIES


def item_handlers() -> ocp.DefaultCheckpointHandlerRegistry:
    """The handlers by item: of tables those that take stores; each process lists what it wrote."""
    registry = ocp.DefaultCheckpointHandlerRegistry()
    for item in (item for name in MEMORIES for item in table_items(name)):
        handler = listed(table_handler())
        registry.add(item, ocp.args.PyTreeSave, handler)
        registry.add(item, ocp.args.PyTreeRestore, handler)
    for item in ("params", "opt_state"):
        handler = listed(ocp.StandardCheckpointHandler())
        registry.add(item, ocp.args.StandardSave, handler)
        registry.add(item, ocp.args.StandardRestore, handler)
    return registry
