"""What a kind of layer is: a block's feed-forward part, from what it reads to what it costs.

A kind is an nnx.Module in `feed_forward.KINDS`, made as `Kind(config, factor, mesh, rngs=rngs)`,
where `factor` divides the std of what projects into the residual stream, and called as

    y_BxLxD, aux = kind(x_BxLxD, read)

Beside that stand two class methods of a ModelConfig: `weights`, the shapes of its parameters by
their names within the layer, and `cost`.
"""

import dataclasses
import operator
from typing import Any

import jax
from flax import nnx

from stem_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Read:
    """What a layer may read beside its input.

    tokens: [B, L] int32 ids. segment_ids: [B, L] int32, 0 = padding. values: [B, L, F], the layer's
    vector of each token's row; None for a layer that reads no rows.
    """

    tokens: jax.Array
    segment_ids: jax.Array
    values: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Aux:
    """What layers give beside the residual stream; layers add theirs up.

    loss: float32 scalar, a mean over the positions of the call, that training adds to its loss;
    None: nothing, which costs no operation. metrics: {name: float32 scalar}, likewise means.
    """

    loss: jax.Array | None = None
    metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def __add__(self, other: "Aux") -> "Aux":
        losses = [aux.loss for aux in (self, other) if aux.loss is not None]
        names = self.metrics | other.metrics
        metrics: dict[str, Any] = {
            name: sum(aux.metrics[name] for aux in (self, other) if name in aux.metrics)
            for name in names
        }
        return Aux(sum(losses[1:], losses[0]) if losses else None, metrics)

    def summed(self) -> "Aux":
        """Of one whose numbers have an axis of layers, in front."""
        return jax.tree.map(lambda x: x.sum(0), self)

    def __truediv__(self, number: int) -> "Aux":
        return jax.tree.map(lambda x: operator.truediv(x, number), self)


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What a layer's feed-forward part costs.

    parameters: of the backbone. reads: those of them that a token uses, and a decode step of one
    sequence reads. matmuls: products of a token, two FLOPs each. elementwise: FLOPs of a token, as
    `cost.PassFlops` counts them. row: numbers of the token's row.
    """

    parameters: int
    reads: int
    matmuls: int
    elementwise: int
    row: int = 0


class FeedForward(nnx.Module):
    """See above; the base of all kinds."""

    @classmethod
    def weights(cls, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, by name within the layer."""
        raise NotImplementedError

    @classmethod
    def cost(cls, config: ModelConfig) -> LayerCost:
        """What one such layer costs."""
        raise NotImplementedError

    def __call__(self, x_BxLxD: jax.Array, read: Read) -> tuple[jax.Array, Aux]:
        """What is added to the residual stream, of its normed values."""
        raise NotImplementedError
