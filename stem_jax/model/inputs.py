"""What the decoder reads for a batch, and what it makes of it."""

import dataclasses
from typing import Any, NamedTuple

import jax

from stem_jax.kernels.row_sums import RowOrder
from stem_jax.model.kind import Aux


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowIndex:
    """Where the rows of a memory's keys are.

    inverse: [B, L], or [B, L, K] of several keys for a token, int32: index of each key's row in the
    row block of its device. order: of `inverse`, for gradients of the rows; without it they sort in
    every layer.
    """

    inverse: jax.Array
    order: RowOrder | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the decoder reads for one batch.

    tokens: [B, L] int32 ids. positions: [B, L] int32 within the document. segment_ids: [B, L]
    int32, 0 = padding. index: of each memory, where its rows are in the block that the decoder is
    given. dropped: [B, L] bool, tokens whose embedding is replaced (their rows stay), or None.
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    index: dict[str, RowIndex] = dataclasses.field(default_factory=dict)
    dropped: jax.Array | None = None


class Outputs(NamedTuple):
    """What the decoder makes of a batch.

    hidden: the normalised final hidden states [B, L, D]. caches: the extended ones, one per layer;
    None without caches. aux: of all layers. states: likewise what its readers carry on to the next
    tokens, by memory; first that of those before the layers.
    """

    hidden: jax.Array
    caches: list | None
    aux: Aux
    states: list[dict[str, Any]] | None = None
