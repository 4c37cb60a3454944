"""Sums of values by row, in float32 and in an order that the indices alone fix.

blocks: for TPUs, a kernel (`row_blocks`) that keeps the sums of neighbouring rows on the chip and
    writes each row once; where rows are no whole tiles, windows.
windows: for matrix units. Values are taken in the order of their rows, found by one sort that
    serves all that have the same index; 512 of them are one product with a matrix of zeros and
    ones, summed in float32. Numbered densely, rows of neighbours differ by 0 or 1, so the values
    touch at most 512 neighbouring rows: each product is written as a window of the result, its
    zeros included, and the next overwrites those. Nothing is filled or read back; the one row that
    two windows share is carried in float32. For 32768 bfloat16 values of width 8192 a v5e needs 4.5
    M cycles besides the gather, by its compiler's estimate; a segmented scan on the vector unit
    needs 50 M.
segments: for GPUs, by the same sort; each row's values are added by one program of a kernel, see
    `row_segments`. A scatter-add with repeated indices has no fixed order there and is slow
    (jax-ml/jax#38806).
scatter: for CPUs, which add one value after the other, as they come.

The bits of a sum depend on the way and on the values of its row, for blocks and windows also on
their places in the order of the sort; not on the number of rows. These two add in the order of the
device's matrix product, which its compiler chooses: the same each time that a program runs. There
values are multiplied by zeros for other rows, so one that is not finite makes its neighbours so.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from stem_jax.kernels.row_blocks import VALUES, columns_fit, put_row_blocks
from stem_jax.kernels.row_segments import put_segment_sums

# What each platform does; the one place that says so.
WAYS = {"tpu": "blocks", "gpu": "segments", "cpu": "scatter"}
# Ways that put the sums of sorted values one behind the other.
SORTED = ("blocks", "windows")
# Values taken at a time, however few there are: a product of another size may add in another order,
# and how many there are depends on the room that an exchange has.
_CHUNK = VALUES


def way_on(mesh: Mesh | None) -> str:
    """The way of the devices of a mesh; without one, of the default device."""
    return WAYS[jax.default_backend() if mesh is None else mesh.devices.flat[0].platform]


def adds(way: str) -> bool:
    """Whether gradients of rows go to those of other micro-batches where they lie.

    Kernels that write whole rows of sums cannot. Scatters could: on CPUs it saves little, and the
    compiler would fuse a step otherwise and round its last bits otherwise than earlier versions.
    """
    return way == "segments"


def spare_rows(way: str) -> int:
    """Rows at the end that a dense index must leave free, see `RowOrder`."""
    return _CHUNK if way in SORTED else 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowOrder:
    """An index [N] sorted, its length rounded up to whole chunks of M values.

    positions: [M] int32, where each value lies among the N. ranks: [M] int32, the number of its row
    among the distinct ones. places: [num_rows] int32, the number of each row among the distinct
    ones, past all of them for a row without values; None if the index is dense, so that rows are
    those numbers, and the last `spare_rows` rows are free.
    """

    positions: jax.Array
    ranks: jax.Array
    places: jax.Array | None = None


def order_of(index: jax.Array, num_rows: int) -> RowOrder:
    """The order of an index of any shape; what is outside [0, num_rows) is dropped."""
    index_N = index.reshape(-1)
    index_N = jnp.where((index_N >= 0) & (index_N < num_rows), index_N, num_rows)
    positions_N = jnp.argsort(index_N)
    rows_N = index_N[positions_N]
    starts_N = jnp.concatenate([jnp.ones(1, bool), rows_N[1:] != rows_N[:-1]])
    ranks_N = jnp.cumsum(starts_N, dtype=jnp.int32) - 1
    target_N = jnp.where(starts_N, rows_N, num_rows)
    past_R = jnp.full(num_rows, jnp.iinfo(jnp.int32).max)
    places_R = past_R.at[target_N].set(ranks_N, mode="drop")
    return dataclasses.replace(dense_order(positions_N, ranks_N), places=places_R)


def dense_order(positions_N: jax.Array, ranks_N: jax.Array) -> RowOrder:
    """The order of a dense index that is sorted already.

    Args:
        positions_N: where the sorted values lie.
        ranks_N: their rows, from 0, each the one before it or the next.
    """
    # The index is made longer and not the values: a copy of those would be the largest array here.
    # What fills the last chunk has a row of its own behind the last one.
    missing = -len(positions_N) % _CHUNK
    positions_M = jnp.pad(positions_N.astype(jnp.int32), (0, missing))
    return RowOrder(
        positions_M, jnp.concatenate([ranks_N, jnp.broadcast_to(ranks_N[-1] + 1, missing)])
    )


def sum_by_row(
    values: jax.Array,
    index: jax.Array,
    num_rows: int,
    way: str,
    order: RowOrder | None = None,
    dtype=jnp.float32,
) -> jax.Array:
    """Sums the values that share a row.

    Args:
        values: [..., F] in any float dtype.
        index: [...] int32, their rows; what is outside [0, num_rows) is dropped.
        way: one of `WAYS`, or `windows`.
        order: of the index; None sorts it if that is needed.
        dtype: of the result; sums are float32 and rounded once.

    Returns:
        [num_rows, F]. Rows without values are zero; with a dense order, those behind the last row
        that has some are undefined.
    """
    values_NxF = jnp.asarray(values).reshape(-1, values.shape[-1])
    index_N = index.reshape(-1)
    if way == "scatter":
        # Negative indices would count from the end.
        index_N = jnp.where(index_N < 0, num_rows, index_N)
        sums_RxF = jnp.zeros((num_rows, values_NxF.shape[1]), jnp.float32)
        sums_RxF = sums_RxF.at[index_N].add(values_NxF.astype(jnp.float32), mode="drop")
        return sums_RxF.astype(dtype)
    order = order_of(index_N, num_rows) if order is None else order
    if way == "segments":
        nothing = jax.lax.empty((1, num_rows, values_NxF.shape[1]), dtype)
        return _put_segments(nothing, 0, values_NxF, order)[0]
    places_N = order.places
    dense = places_N is None
    room = num_rows if dense else min(len(index_N), num_rows) + _CHUNK + 1
    nothing = jax.lax.empty((1, room, values_NxF.shape[1]), dtype)
    sums_UxF = _put(nothing, jnp.int32(0), values_NxF, order, way)[0]
    if places_N is None:
        return sums_UxF
    # A row of zeros to read costs less than a pass that masks what was read.
    room -= 1
    sums_UxF = sums_UxF.at[room].set(0)
    return sums_UxF.at[jnp.minimum(places_N, room)].get(mode="promise_in_bounds")


def put_sums_by_row(
    into_SxRxF: jax.Array,
    number: jax.Array,
    values: jax.Array,
    index: jax.Array,
    way: str,
    order: RowOrder | None = None,
    *,
    added: bool = False,
) -> jax.Array:
    """`into` with the sums in the place of its [number], see `sum_by_row`; the rest as it is.

    Args:
        added: to what lies in that place, after they are rounded as the values are.
    """
    values_NxF = values.reshape(-1, values.shape[-1])
    if way == "segments" and order is not None:
        return _put_segments(into_SxRxF, number, values_NxF, order, added)
    if way in SORTED and order is not None and order.places is None and not added:
        return _put(into_SxRxF, number, values_NxF, order, way)
    _, num_rows, _ = into_SxRxF.shape
    kind = values.dtype if added else into_SxRxF.dtype
    sums_RxF = sum_by_row(values, index, num_rows, way, order, kind).astype(into_SxRxF.dtype)
    if added:
        sums_RxF += jax.lax.dynamic_index_in_dim(into_SxRxF, number, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(into_SxRxF, sums_RxF, number, 0)


def _put_segments(
    into_SxRxF, number, values_NxF, order: RowOrder, added: bool = False
) -> jax.Array:
    """Sums at [number], a row of zeros for each that has no values; or added to what is there."""
    size = len(order.ranks)
    begins_M = jnp.diff(order.ranks, prepend=-1) > 0
    starts = jnp.full(size + 1, size, jnp.int32)
    starts = starts.at[jnp.where(begins_M, order.ranks, size + 1)].set(
        jnp.arange(size, dtype=jnp.int32), mode="drop"
    )
    places_R = jnp.arange(into_SxRxF.shape[1]) if order.places is None else order.places
    places_R = jnp.minimum(places_R, size)
    bounds_Rx2 = starts[jnp.stack([places_R, jnp.minimum(places_R + 1, size)], axis=1)]
    return put_segment_sums(into_SxRxF, number, values_NxF, order.positions, bounds_Rx2, added)


def _put(into_SxRxF, number, values_NxF, order: RowOrder, way: str) -> jax.Array:
    """Sums by rank at [number]; there must be room for a whole chunk from the last rank on."""
    if way == "blocks" and columns_fit(values_NxF.shape[1]):
        values_MxF = values_NxF.at[order.positions].get(mode="promise_in_bounds")
        return put_row_blocks(into_SxRxF, number, values_MxF, order.ranks)
    return _put_windows(into_SxRxF, number, values_NxF, order)


def _put_windows(into_SxRxF, number, values_NxF, order: RowOrder) -> jax.Array:
    size, kind, dtype = _CHUNK, values_NxF.dtype, into_SxRxF.dtype
    # By default TPUs round float32 operands to bfloat16, and GPUs to tf32.
    exact = jax.lax.Precision.HIGHEST if kind == jnp.float32 else None

    def add(hot_RxC, values_CxF):
        return jax.lax.dot(
            hot_RxC.astype(kind), values_CxF, precision=exact, preferred_element_type=jnp.float32
        )

    def put(into_SxRxF, rows_NxF, first):
        rows_1xNxF = rows_NxF.astype(dtype)[None]
        return jax.lax.dynamic_update_slice(into_SxRxF, rows_1xNxF, (number, first, 0))

    def one_chunk(carry, chunk):
        into_SxRxF, open_1xF, open_row = carry
        positions_C, ranks_C = chunk
        first, last = ranks_C[0], ranks_C[-1]
        values_CxF = values_NxF[positions_C]
        rows_Cx1 = first + jnp.arange(size)[:, None]
        window_CxF = add(ranks_C == rows_Cx1, values_CxF)
        ends_2xF = add(jnp.stack([ranks_C == first, ranks_C == last]), values_CxF)
        # The first row may be the one that the last chunk left open.
        first_1xF = ends_2xF[:1] + jnp.where(first == open_row, open_1xF, 0)
        last_1xF = jnp.where(first == last, first_1xF, ends_2xF[1:])
        into_SxRxF = put(put(into_SxRxF, window_CxF, first), first_1xF, first)
        return (into_SxRxF, last_1xF, last), None

    start = (into_SxRxF, jnp.zeros((1, values_NxF.shape[1]), jnp.float32), jnp.int32(-1))
    pieces = order.positions.reshape(-1, size), order.ranks.reshape(-1, size)
    return jax.lax.scan(one_chunk, start, pieces)[0][0]
