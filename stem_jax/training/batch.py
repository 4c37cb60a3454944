"""A global batch on the devices."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """A global batch as micro-batches, each array [A, B, L].

    B lies over the batch axes, and L over context in the order of `context_order`.
    tokens, targets, positions, segment_ids: int32. loss_mask: bool, the positions that are scored.
    keys: int32, [A, B, L] or [A, B, L, K], those of memories whose keys come with the batch.
    """

    tokens: jax.Array
    targets: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    loss_mask: jax.Array
    keys: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
