"""A matrix for each of a token's rows: what a residual stream gets of several rows together."""

import jax
import jax.numpy as jnp
from flax import nnx

from stem_jax.kernels.kept_names import projection
from stem_jax.model.layers import truncated_normal
from stem_jax.parts import part

# Columns of rows lie over `tensor`, and so does what they are multiplied with.
_AXES = ("row_keys", "memory", "embed")


class RowProjection(nnx.Module):
    """y = sum_k row_k W_k, which is the rows behind each other times one matrix; no bias."""

    def __init__(self, shape_KxFxD: tuple[int, int, int], std: float, *, rngs: nnx.Rngs):
        """Of K rows of F numbers; a std of 0 begins with zeros."""
        value = (
            truncated_normal(rngs.params(), shape_KxFxD, std, 3 * std, _AXES)
            if std
            else jnp.zeros(shape_KxFxD)
        )
        self.kernel = nnx.Param(value, logical_axes=_AXES)

    @part("block_matmuls")
    def __call__(self, rows_BxLxKxF: jax.Array) -> jax.Array:
        """[B, L, D] in the dtype of the rows."""
        kernel_KxFxD = self.kernel[...].astype(rows_BxLxKxF.dtype)
        return projection(jnp.einsum("blkf,kfd->bld", rows_BxLxKxF, kernel_KxFxD))
