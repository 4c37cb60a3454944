"""N-gram embeddings at the input: what rows of n-grams hold is added to the token's embedding.

    x_0 = (e + sum_k W_k row_k) / (K + 1)

As over-encoding and LongCat-Flash-Lite have it: a mean of K + 1 embeddings, K of them of n-grams,
which are narrower and have a matrix each. A trained backbone reads another x_0 from the start.
"""

import math

import jax
from flax import nnx
from jax.sharding import Mesh

from stem_jax.config import Config
from stem_jax.memory.memory import Memory
from stem_jax.mesh import constrain_tokens
from stem_jax.model.kind import LayerCost
from stem_jax.model.ngram_reader import NGramReader
from stem_jax.model.reader import INPUT
from stem_jax.model.row_projection import RowProjection


class NGramEmbedding(NGramReader):
    """See above."""

    site = INPUT

    def __init__(
        self,
        *,
        embed_dim: int,
        keys: int,
        width: int,
        base_std: float | None = None,
        mesh: Mesh | None,
        rngs: nnx.Rngs,
    ):
        """Of `keys` rows of `width` for a token; base_std: None: width^-0.5."""
        shape = (keys, width, embed_dim)
        self.row_proj = RowProjection(shape, base_std or width**-0.5, rngs=rngs)
        self.mesh = mesh

    @classmethod
    def of(cls, config: Config, memory: Memory, mesh: Mesh | None, *, rngs: nnx.Rngs):
        """See `Reader`."""
        sizes, std = cls.sizes_of(config, memory), config.model.init_base_std
        return cls(**sizes, base_std=std, mesh=mesh, rngs=rngs)

    @classmethod
    def weights(cls, *, embed_dim: int, keys: int, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, by name within the reader."""
        return {"row_proj.kernel": (keys, width, embed_dim)}

    @classmethod
    def cost(cls, *, embed_dim: int, keys: int, width: int) -> LayerCost:
        """What it costs."""
        shapes = cls.weights(embed_dim=embed_dim, keys=keys, width=width)
        weights = sum(map(math.prod, shapes.values()))
        # A sum and a quotient.
        return LayerCost(weights, weights, weights, 2 * embed_dim, keys * width)

    def __call__(
        self, x_BxLxD, embedded_BxLxD, rows_BxLxKxF, segment_ids_BxL, state
    ) -> tuple[jax.Array, object]:
        """x_0 [B, L, D] in the dtype of x, which is the embedding; state as it was."""
        rows_BxLxKxF = rows_BxLxKxF.astype(x_BxLxD.dtype)
        # Devices of `tensor` add up what their columns give.
        of_rows_BxLxD = constrain_tokens(self.row_proj(rows_BxLxKxF), self.mesh)
        return (x_BxLxD + of_rows_BxLxD) / (rows_BxLxKxF.shape[2] + 1), state
