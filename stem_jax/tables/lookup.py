"""Rows of a block for each token, and the way back: one sum per distinct row, in a fixed order."""

import functools

import jax
from jax.sharding import Mesh, PartitionSpec

from stem_jax.kernels.row_sums import RowOrder, sum_by_row, way_on
from stem_jax.mesh import BATCH_AXES
from stem_jax.parts import part

_ROWS = PartitionSpec(BATCH_AXES, "tensor")
_BATCH = PartitionSpec(BATCH_AXES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
@part("row_lookup")
def lookup(
    rows_UxF: jax.Array, inverse: jax.Array, order: RowOrder | None, mesh: Mesh | None
) -> jax.Array:
    """`rows[inverse]` on every device's own block.

    Args:
        rows_UxF: blocks of the devices, concatenated along the first dimension.
        inverse: [B, ...] int32, index into the own device's block.
        order: of each device's part of the index, its arrays concatenated likewise, for the way
            back; None sorts there.
        mesh: None on a single device without a mesh.

    Returns:
        [B, ..., F] in the dtype of the rows.
    """
    if mesh is None:
        return rows_UxF[inverse]
    return jax.shard_map(
        lambda rows, inverse: rows[inverse],
        mesh=mesh,
        in_specs=(_ROWS, _BATCH),
        out_specs=_values(inverse),
        check_vma=False,
    )(rows_UxF, inverse)


def _values(inverse: jax.Array) -> PartitionSpec:
    return PartitionSpec(BATCH_AXES, *(None,) * (inverse.ndim - 1), "tensor")


def _forward(rows_UxF, inverse, order, mesh):
    kept = inverse, order, rows_UxF.shape[0]
    return lookup(rows_UxF, inverse, order, mesh), kept


@part("row_gradient")
def _backward(mesh, kept, gradient):
    inverse, order, num_rows = kept
    room = num_rows // (1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"])

    def local(inverse, order, gradient):
        return sum_by_row(gradient, inverse, room, way_on(mesh), order, gradient.dtype)

    if mesh is not None:
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(_BATCH, _BATCH, _values(inverse)),
            out_specs=_ROWS,
            check_vma=False,
        )
    return local(inverse, order, gradient), None, None


lookup.defvjp(_forward, _backward)
