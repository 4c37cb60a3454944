"""Token embedding: one vector per token, vocabulary over `tensor`, width over `fsdp`.

The lookup is written out per device: partitioned automatically, a gather from a weight sharded in
both dimensions replicates its result on the way, and the scatter-add of its gradient has duplicate
indices.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from stem_jax.kernels.row_sums import sum_by_row, way_on
from stem_jax.mesh import gather, live_axes, sum_and_scatter, token_spec
from stem_jax.model.layers import truncated_normal
from stem_jax.parts import part

_WEIGHT = PartitionSpec("tensor", "fsdp")
_TOKENS = token_spec()


class Embedding(nnx.Module):
    """The input embedding [V, D]; with tied embeddings its transpose is the output head."""

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        mesh: Mesh | None,
        *,
        has_dropout: bool,
        rngs: nnx.Rngs,
    ):
        std = embed_dim**-0.5
        axes = ("vocab", "embed")
        value = truncated_normal(rngs.params(), (vocab_size, embed_dim), std, 3 * std, axes)
        self.weight = nnx.Param(value, logical_axes=axes)
        self.mesh = mesh
        if has_dropout:
            instead = truncated_normal(rngs.params(), (embed_dim,), std, 3 * std, ("norm",))
            self.dropped = nnx.Param(instead, logical_axes=("norm",))

    @part("embedding")
    def __call__(self, tokens_BxL: jax.Array, dtype, dropped_BxL=None) -> jax.Array:
        """Vectors [B, L, D] in `dtype`; where `dropped_BxL`, one learned vector instead."""
        vectors_BxLxD = embed(self.weight[...], tokens_BxL, dtype, self.mesh)
        if dropped_BxL is None:
            return vectors_BxLxD
        return jnp.where(dropped_BxL[..., None], self.dropped[...].astype(dtype), vectors_BxLxD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def embed(weight_VxD: jax.Array, tokens_BxL: jax.Array, dtype, mesh: Mesh | None) -> jax.Array:
    """`weight[tokens]` as [B, L, D] in `dtype`; gradients of a token are summed in float32."""
    if mesh is None:
        return weight_VxD[tokens_BxL].astype(dtype)

    def local(weight, tokens):
        weight = gather(weight.astype(dtype), "fsdp", 1, mesh)
        if not live_axes(mesh, "tensor"):
            return weight[tokens]
        local_tokens = tokens - jax.lax.axis_index("tensor") * weight.shape[0]
        here = (local_tokens >= 0) & (local_tokens < weight.shape[0])
        vectors = weight[jnp.where(here, local_tokens, 0)]
        return jax.lax.psum(jnp.where(here[..., None], vectors, 0), "tensor")

    return jax.shard_map(
        local, mesh=mesh, in_specs=(_WEIGHT, _TOKENS), out_specs=_TOKENS, check_vma=False
    )(weight_VxD, tokens_BxL)


def _forward(weight_VxD, tokens_BxL, dtype, mesh):
    # An empty slice carries the shape and dtype of the weight without keeping it alive.
    return embed(weight_VxD, tokens_BxL, dtype, mesh), (tokens_BxL, weight_VxD[:, :0])


@part("embedding_backward")
def _backward(dtype, mesh, residuals, gradient_BxLxD):
    tokens_BxL, like_Vx0 = residuals
    vocab_size, weight_dtype = like_Vx0.shape[0], like_Vx0.dtype
    shards = 1 if mesh is None else mesh.shape["tensor"]

    def local(tokens, gradient):
        size = vocab_size // shards
        if live_axes(mesh, "tensor"):
            tokens = tokens - jax.lax.axis_index("tensor") * size
        sums = sum_by_row(gradient, tokens, size, way_on(mesh))
        sums = sum_and_scatter(sums, "fsdp", 1, mesh)
        return sums.astype(weight_dtype)

    if mesh is not None:
        local = jax.shard_map(
            local, mesh=mesh, in_specs=(_TOKENS, _TOKENS), out_specs=_WEIGHT, check_vma=False
        )
    return local(tokens_BxL, gradient_BxLxD), None


embed.defvjp(_forward, _backward)
