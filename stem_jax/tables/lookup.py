"""Rows of a block for each token, and the way back: one sum per distinct row, in a fixed order."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from stem_jax.mesh import BATCH_AXES
from stem_jax.parts import part

# Values that one segmented scan takes at a time.
_CHUNK = 512
_ROWS = PartitionSpec(BATCH_AXES, "tensor")
_INDEX = PartitionSpec(BATCH_AXES, None)
_VALUES = PartitionSpec(BATCH_AXES, None, "tensor")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
@part("row_lookup")
def lookup(rows_UxF: jax.Array, inverse_BxL: jax.Array, mesh: Mesh | None) -> jax.Array:
    """`rows[inverse]` on every device's own block.

    Args:
        rows_UxF: blocks of the devices, concatenated along the first dimension.
        inverse_BxL: index into the own device's block.
        mesh: None on a single device without a mesh.

    Returns:
        [B, L, F] in the dtype of the rows.
    """
    if mesh is None:
        return rows_UxF[inverse_BxL]
    return jax.shard_map(
        lambda rows, inverse: rows[inverse],
        mesh=mesh,
        in_specs=(_ROWS, _INDEX),
        out_specs=_VALUES,
        check_vma=False,
    )(rows_UxF, inverse_BxL)


def _forward(rows_UxF, inverse_BxL, mesh):
    return lookup(rows_UxF, inverse_BxL, mesh), (inverse_BxL, rows_UxF.shape[0])


@part("row_gradient")
def _backward(mesh, residuals, gradient_BxLxF):
    inverse_BxL, num_rows = residuals
    blocks = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]

    def local(inverse, gradient):
        width = gradient.shape[-1]
        sums = sum_by_row(gradient.reshape(-1, width), inverse.reshape(-1), num_rows // blocks)
        return sums.astype(gradient.dtype)

    if mesh is not None:
        local = jax.shard_map(
            local, mesh=mesh, in_specs=(_INDEX, _VALUES), out_specs=_ROWS, check_vma=False
        )
    return local(inverse_BxL, gradient_BxLxF), None


lookup.defvjp(_forward, _backward)


def sum_by_row(values_NxF: jax.Array, index_N: jax.Array, num_rows: int) -> jax.Array:
    """Sums the values that share an index, in float32 and in an order fixed by the indices alone.

    A scatter-add with repeated indices has no fixed order on GPUs and is slow there
    (jax-ml/jax#38806), so: sort by index, segmented scan, write the end of each segment.

    Args:
        values_NxF: any float dtype.
        index_N: int32; values whose index is outside [0, num_rows) are dropped.

    Returns:
        [num_rows, F] float32; rows that no index names are zero.
    """
    order_N = jnp.argsort(index_N)
    sorted_N = index_N[order_N]
    starts_N = jnp.concatenate([jnp.ones(1, bool), sorted_N[1:] != sorted_N[:-1]])
    # The end of a segment holds its sum; every other position falls outside and is dropped.
    ends_N = jnp.concatenate([starts_N[1:], jnp.ones(1, bool)])
    # Negative indices would count from the end.
    target_N = jnp.where(ends_N & (sorted_N >= 0), sorted_N, num_rows)

    def combine(left, right):
        (left_sum, left_starts), (right_sum, right_starts) = left, right
        total = jnp.where(right_starts[:, None], right_sum, left_sum + right_sum)
        return total, left_starts | right_starts

    def one_chunk(carry, chunk):
        sums_RxF, open_F = carry
        order_C, starts_C, target_C = chunk
        values_CxF = values_NxF[order_C].astype(jnp.float32)
        # A segment that the last chunk left open goes on.
        values_CxF = values_CxF.at[0].add(jnp.where(starts_C[0], 0.0, open_F))
        scanned_CxF, _ = jax.lax.associative_scan(combine, (values_CxF, starts_C))
        sums_RxF = sums_RxF.at[target_C].set(scanned_CxF, mode="drop")
        return (sums_RxF, scanned_CxF[-1]), None

    width, length = values_NxF.shape[1], index_N.shape[0]
    empty = (jnp.zeros((num_rows, width), jnp.float32), jnp.zeros(width, jnp.float32))
    # A scan over everything at once would hold several float32 copies of the values.
    chunk = _CHUNK if length % _CHUNK == 0 else length
    pieces = jax.tree.map(lambda x: x.reshape(-1, chunk), (order_N, starts_N, target_N))
    (sums_RxF, _), _ = jax.lax.scan(one_chunk, empty, pieces)
    return sums_RxF
