"""Per-layer embeddings: behind each FFN, the token's row and its embedding gate the residual.

    p = (norm(W_p e) + sqrt(P) row) / sqrt(2)
    x += norm(W_o (gelu_tanh(W_i x) * p))

e is the token's embedding and x the residual stream, neither of them normed. As in Gemma 4 with
`layer_scalar` 1, but that each layer here has of its own what layers there share: its slice of the
one matrix W_p, and the norm of W_p e. There e is multiplied by sqrt(D) and W_p e divided by it,
which is the same.
"""

import math

import jax
from flax import nnx
from jax.sharding import Mesh

from stem_jax.config import Config
from stem_jax.memory.memory import Memory
from stem_jax.mesh import constrain_tokens
from stem_jax.model.kind import LayerCost
from stem_jax.model.layers import Linear, RMSNorm
from stem_jax.model.reader import AFTER_FEED_FORWARD, Reader


class PerLayerReader(Reader):
    """See above. A row is [P]."""

    site = AFTER_FEED_FORWARD
    silent = ("out_norm.scale",)

    def __init__(
        self,
        *,
        embed_dim: int,
        width: int,
        norm_eps: float,
        base_std: float | None = None,
        output_scale: float = 1.0,
        mesh: Mesh | None,
        rngs: nnx.Rngs,
    ):
        """Of a residual stream of `embed_dim` and rows of `width`.

        Args:
            base_std: of what reads; None: one over the square root of the numbers read.
            output_scale: of the last norm at first, which alone says how much is added; 0 begins
                with a backbone that is as it was.
        """
        D, P = embed_dim, width
        std, out_std = base_std or D**-0.5, base_std or P**-0.5
        self.gate_proj = Linear((D, P), ("embed", "memory"), std, 3 * std, rngs=rngs)
        self.embed_proj = Linear((D, P), ("embed", "memory"), std, 3 * std, rngs=rngs)
        self.embed_norm = RMSNorm(P, norm_eps)
        self.out_proj = Linear((P, D), ("memory", "embed"), out_std, 3 * out_std, rngs=rngs)
        self.out_norm = RMSNorm(D, norm_eps, output_scale)
        self.width, self.mesh = P, mesh

    @classmethod
    def of(cls, config: Config, memory: Memory, mesh: Mesh | None, *, rngs: nnx.Rngs):
        """See `Reader`."""
        model = config.model
        return cls(
            embed_dim=model.embed_dim,
            width=memory.width,
            norm_eps=model.norm_eps,
            base_std=model.init_base_std,
            mesh=mesh,
            rngs=rngs,
        )

    @classmethod
    def weights_of(cls, config: Config, memory: Memory) -> dict[str, tuple[int, ...]]:
        """See `Reader`."""
        return cls.weights(embed_dim=config.model.embed_dim, width=memory.width)

    @classmethod
    def cost_of(cls, config: Config, memory: Memory) -> LayerCost:
        """See `Reader`."""
        return cls.cost(embed_dim=config.model.embed_dim, width=memory.width)

    @classmethod
    def weights(cls, *, embed_dim: int, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, by name within the reader."""
        D, P = embed_dim, width
        return {
            "gate_proj.kernel": (D, P),
            "embed_proj.kernel": (D, P),
            "embed_norm.scale": (P,),
            "out_proj.kernel": (P, D),
            "out_norm.scale": (D,),
        }

    @classmethod
    def cost(cls, *, embed_dim: int, width: int) -> LayerCost:
        """What one layer's costs."""
        D, P = embed_dim, width
        shapes = cls.weights(embed_dim=D, width=P).values()
        weights, matmuls = sum(map(math.prod, shapes)), 3 * D * P
        # Of P: a norm in four; the row times sqrt(P), added, times 1 / sqrt(2); x^3 in gelu_tanh
        # and what it is multiplied with and added to, eight; times p. Of D: a norm, added.
        return LayerCost(weights, weights, matmuls, elementwise=16 * P + 5 * D, row=P)

    def __call__(self, x_BxLxD, embedded_BxLxD, rows_BxLx1xP, segment_ids_BxL, state):
        """The residual stream with what is added to it, [B, L, D]; state as it was."""
        of_embedding_BxLxP = self.embed_norm(self.embed_proj(embedded_BxLxD))
        of_token_BxLxP = self.width**0.5 * rows_BxLx1xP[:, :, 0]
        p_BxLxP = (of_embedding_BxLxP + of_token_BxLxP.astype(x_BxLxD.dtype)) * 0.5**0.5
        gate_BxLxP = jax.nn.gelu(self.gate_proj(x_BxLxD), approximate=True)
        # Devices of `tensor` add up what their columns give, before the norm.
        y_BxLxD = constrain_tokens(self.out_proj(gate_BxLxP * p_BxLxP), self.mesh)
        return x_BxLxD + self.out_norm(y_BxLxD), state
