"""Rows of a block for each token, and the way back: one sum per distinct row, in a fixed order.

The vectors of all layers are one array, and so are their gradients. A layer reads its own by an
index into the whole, and on the way back writes its own into the whole: nothing is cut out, filled,
or put together.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stem_jax.kernels.row_sums import RowOrder, put_sums_by_row, way_on
from stem_jax.mesh import TOKEN_AXES, token_spec
from stem_jax.parts import part

_VECTORS = PartitionSpec(None, TOKEN_AXES, "tensor")
_TOKENS = token_spec()
_ORDER = PartitionSpec(TOKEN_AXES)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerRows:
    """A row block as the layers read it, each its own vectors.

    vectors: [S, U, F]; with several devices the blocks of the devices, concatenated along U.
    thread: these again, never read. It goes through the layers as the residual stream does, from
    `open_rows` to `close_rows`: on the way back it is the array that gathers the gradients. Or sums
    of gradients to which those of these layers are added where they lie; the gradient of the sums
    is then the new sums.
    added: whether the thread has sums. whole: whether each of the S vectors is looked up.
    """

    vectors: jax.Array
    thread: jax.Array
    added: bool = dataclasses.field(default=False, metadata={"static": True})
    whole: bool = dataclasses.field(default=True, metadata={"static": True})


@part("row_copies")
def open_rows(
    vectors_SxUxF: jax.Array, sums_SxUxF: jax.Array | None = None, whole: bool = True
) -> LayerRows:
    """From the rows of a block, or of the blocks of several devices, concatenated along U.

    Args:
        sums_SxUxF: float32 gradients of other micro-batches; with them the vectors have none.
        whole: each of the S vectors will be looked up, once; else some at most once.
    """
    vectors = jax.lax.stop_gradient(vectors_SxUxF)
    if sums_SxUxF is None:
        return LayerRows(vectors, vectors_SxUxF, whole=whole)
    return LayerRows(vectors, sums_SxUxF, added=True, whole=whole)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def close_rows(x: jax.Array, rows: LayerRows, mesh: Mesh | None) -> jax.Array:
    """x, after the last layer and all lookups."""
    return x


def _close(x, rows, mesh):
    return x, rows


def _reopen(mesh, rows, gradient):
    # Each layer overwrites its own.
    thread = rows.thread
    if rows.added:
        return gradient, LayerRows(None, thread, added=True, whole=rows.whole)
    # What nobody looks up has no gradient.
    begin = jax.lax.empty if rows.whole else jnp.zeros
    if mesh is None:
        return gradient, LayerRows(None, begin(thread.shape, thread.dtype), whole=rows.whole)
    # Partitioned automatically, every GPU would make room for the rows of all.
    own = NamedSharding(mesh, _VECTORS).shard_shape(thread.shape)
    local = functools.partial(begin, own, thread.dtype)
    make = jax.shard_map(local, mesh=mesh, in_specs=(), out_specs=_VECTORS, check_vma=False)
    return gradient, LayerRows(None, make(), whole=rows.whole)


close_rows.defvjp(_close, _reopen)


def lookup(
    rows: LayerRows,
    number: jax.Array | int,
    inverse: jax.Array,
    order: RowOrder | None,
    mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array]:
    """A vector of each token's row, on every device from its own block.

    Args:
        number: which of the S vectors.
        inverse: [B, L, ...] int32, index into the own device's block.
        order: of each device's part of the index, its arrays concatenated likewise, for the way
            back; None sorts there.
        mesh: None on a single device without a mesh.

    Returns:
        [B, L, ..., F] in the dtype of the rows, and the rows' thread for the next layer.
    """
    return _lookup(rows.vectors, rows.thread, jnp.int32(number), inverse, order, mesh, rows.added)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
@part("row_lookup")
def _lookup(vectors_SxUxF, thread_SxUxF, number, inverse, order, mesh, added):
    def local(vectors_SxUxF, number, inverse):
        size, width = vectors_SxUxF.shape[1:]
        return vectors_SxUxF.reshape(-1, width)[number * size + inverse]

    if mesh is not None:
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(_VECTORS, PartitionSpec(), _TOKENS),
            out_specs=_values(inverse),
            check_vma=False,
        )
    return local(vectors_SxUxF, number, inverse), thread_SxUxF


def _values(inverse: jax.Array) -> PartitionSpec:
    return token_spec(*(None,) * (inverse.ndim - 2), "tensor")


def _forward(vectors_SxUxF, thread_SxUxF, number, inverse, order, mesh, added):
    found = _lookup(vectors_SxUxF, thread_SxUxF, number, inverse, order, mesh, added)
    return found, (number, inverse, order)


@part("row_gradient")
def _backward(mesh, added, kept, gradients):
    gradient, thread_SxUxF = gradients

    def local(thread_SxUxF, number, inverse, order, gradient):
        way = way_on(mesh)
        return put_sums_by_row(thread_SxUxF, number, gradient, inverse, way, order, added=added)

    if mesh is not None:
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(_VECTORS, PartitionSpec(), _TOKENS, _ORDER, _values(kept[1])),
            out_specs=_VECTORS,
            check_vma=False,
        )
    # What the vectors are read for, the thread has the gradient of.
    return None, local(thread_SxUxF, *kept, gradient), None, None, None


_lookup.defvjp(_forward, _backward)
