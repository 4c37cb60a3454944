"""Value embeddings: the token's row is added to attention's values, head by head through a gate.

    v += 3 sigmoid(W x[:12])_head * row

x is attention's normed input. As in nanochat (92d63d4), whose table and gate are those of every
other layer, the last included; it draws rows from a uniform distribution of std D^-0.5, and trains
them by AdamW with half the embedding's learning rate, decay 0.01 and betas 0.8, 0.995.
"""

import math

import jax
from flax import nnx
from jax.sharding import Mesh

from stem_jax.config import Config
from stem_jax.errors import InputError
from stem_jax.memory.memory import Memory
from stem_jax.mesh import LOGICAL_TO_MESH, constrain_tokens
from stem_jax.model.attention import kv_heads_axis
from stem_jax.model.kind import LayerCost
from stem_jax.model.layers import Linear
from stem_jax.model.reader import VALUES, Reader

# As many numbers of x as the gate reads, and the most that it gives.
GATE_INPUTS = 12
_MOST = 3
# nanochat draws gates from 0 to this. Ours lie evenly around 0; all gates begin at about half of 3.
_GATE_CUT = 0.02


class ValueReader(Reader):
    """See above. A row is [K * Dh], head by head as attention's values are."""

    site = VALUES

    def __init__(self, *, embed_dim: int, num_kv_heads: int, mesh: Mesh | None, rngs: nnx.Rngs):
        if embed_dim < GATE_INPUTS:
            raise InputError(
                f"model.embed_dim={embed_dim} is less than the {GATE_INPUTS} numbers that the gate "
                "of a value memory reads; make it larger, or leave the memory out"
            )
        axis = kv_heads_axis(num_kv_heads, mesh)
        shape = (GATE_INPUTS, num_kv_heads)
        self.gate_proj = Linear(shape, ("gate_inputs", axis), _GATE_CUT / 2, _GATE_CUT, rngs=rngs)
        self.num_kv_heads, self.mesh = num_kv_heads, mesh
        # Of the heads, and of the columns of rows in which they lie one after the other.
        self.heads_axis = LOGICAL_TO_MESH[axis]

    @classmethod
    def of(cls, config: Config, memory: Memory, mesh: Mesh | None, *, rngs: nnx.Rngs):
        """See `Reader`."""
        model = config.model
        return cls(embed_dim=model.embed_dim, num_kv_heads=model.num_kv_heads, mesh=mesh, rngs=rngs)

    @classmethod
    def weights_of(cls, config: Config, memory: Memory) -> dict[str, tuple[int, ...]]:
        """See `Reader`."""
        return cls.weights(num_kv_heads=config.model.num_kv_heads)

    @classmethod
    def cost_of(cls, config: Config, memory: Memory) -> LayerCost:
        """See `Reader`."""
        model = config.model
        return cls.cost(num_kv_heads=model.num_kv_heads, head_dim=model.head_dim)

    @classmethod
    def weights(cls, *, num_kv_heads: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, by name within the reader."""
        return {"gate_proj.kernel": (GATE_INPUTS, num_kv_heads)}

    @classmethod
    def cost(cls, *, num_kv_heads: int, head_dim: int) -> LayerCost:
        """What one layer's costs."""
        weights = sum(map(math.prod, cls.weights(num_kv_heads=num_kv_heads).values()))
        row = num_kv_heads * head_dim
        # sigmoid(x) = 1 / (1 + exp(-x)) in three, times 3; the row times that, added.
        elementwise = 4 * num_kv_heads + 2 * row
        return LayerCost(weights, weights, weights, elementwise, row)

    def __call__(self, x_BxLxD, embedded_BxLxD, rows_BxLx1xF, segment_ids_BxL, state):
        """What is added to the values, [B, L, K, Dh] in the dtype of the rows; state as it was."""
        B, L = x_BxLxD.shape[:2]
        gate_BxLxK = _MOST * jax.nn.sigmoid(self.gate_proj(x_BxLxD[..., :GATE_INPUTS]))
        # Columns come over `tensor`. Where devices share heads, each has all, as it has all values.
        rows_BxLx1xF = constrain_tokens(rows_BxLx1xF, self.mesh, None, self.heads_axis)
        heads_BxLxKxDh = rows_BxLx1xF.reshape(B, L, self.num_kv_heads, -1)
        return gate_BxLxK[..., None].astype(heads_BxLxKxDh.dtype) * heads_BxLxKxDh, state
