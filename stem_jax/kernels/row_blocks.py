"""Sums of sorted values by row, as a TPU kernel that writes each row once.

128 values are one product with a matrix of zeros and ones; the sums of 256 neighbouring rows stay
on the chip in float32. Ranks rise by 0 or 1, so 128 values never touch more than those; once values
have passed the first 128 rows, these are whole and go to their place in the result: 128 rows from
a multiple of 128 on, which is where tiles begin. Rows are neither read back nor written twice.

A row's values are added product by product in the order of the values, so the bits of its sum
depend on its values and on their places among all values, not on the number of rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Values of a product, and rows that are written at a time.
_SIZE = 128
# Values that are brought to the chip at a time, and their bytes, which with sums and results leave
# room in the 16 MiB that a kernel has.
VALUES = 512
_BYTES = 2**21
_PAST_ALL = jnp.iinfo(jnp.int32).max


def columns_fit(width: int) -> bool:
    """Whether rows of this width are whole tiles."""
    return width % 128 == 0


def put_row_blocks(
    into_SxRxF: jax.Array, number: jax.Array, values_NxF: jax.Array, ranks_N: jax.Array
) -> jax.Array:
    """`into` with the sums in the place of its [number]; the rest as it is.

    Args:
        into_SxRxF: with a multiple of 128 rows from the last rank on, or more; given away.
        values_NxF: N a multiple of `VALUES`, F one of 128.
        ranks_N: int32 from 0, each the one before it or the next.
    """
    (N, F), kind = values_NxF.shape, values_NxF.dtype
    most = _BYTES // (VALUES * kind.itemsize)
    width = next(w for w in range(min(most, F), 0, -128) if F % w == 0 and w % 128 == 0)
    turns, groups = N // VALUES, VALUES // _SIZE
    # A turn without values behind the last: its first group writes the rows that are left.
    lasts_G = jnp.pad(ranks_N.reshape(-1, _SIZE)[:, -1], (0, groups))
    lasts_G = lasts_G.at[turns * groups].set(_PAST_ALL)
    ranks_1xN = jnp.pad(ranks_N, (0, VALUES), constant_values=-1)[None]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(F // width, turns + 1),
        in_specs=[
            pl.BlockSpec((1, VALUES), lambda column, turn, *_: (0, turn)),
            pl.BlockSpec(
                (VALUES, width), lambda column, turn, *_: (jnp.minimum(turn, turns - 1), column)
            ),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        scratch_shapes=[
            pltpu.SMEM((1,), jnp.int32),
            pltpu.VMEM((2 * _SIZE, width), jnp.float32),
            pltpu.VMEM((_SIZE, width), into_SxRxF.dtype),
            pltpu.SemaphoreType.DMA,
        ],
    )
    return pl.pallas_call(
        functools.partial(_add, width=width),
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct(into_SxRxF.shape, into_SxRxF.dtype),
        input_output_aliases={4: 0},
        cost_estimate=_cost(values_NxF, into_SxRxF),
        name="row_blocks",
    )(lasts_G, jnp.reshape(number, 1).astype(jnp.int32), ranks_1xN, values_NxF, into_SxRxF)


def _cost(values_NxF: jax.Array, into_SxRxF: jax.Array) -> pl.CostEstimate:
    """Values are read once, and what rows there can be of them or is room for, written once."""
    (N, F), R = values_NxF.shape, into_SxRxF.shape[1]
    rows = min(N, R) // _SIZE * _SIZE
    return pl.CostEstimate(
        flops=2 * (2 * _SIZE) * N * F,
        transcendentals=0,
        bytes_accessed=F * (N * values_NxF.dtype.itemsize + rows * into_SxRxF.dtype.itemsize),
    )


def _add(lasts, number, ranks, values, _before, into, base, sums, rows, done, *, width: int):
    """One turn: values in groups; see `put_row_blocks`."""
    column, turn = pl.program_id(0), pl.program_id(1)

    @pl.when(turn == 0)
    def _():
        base[0] = 0
        sums[...] = jnp.zeros_like(sums)

    # By default float32 operands would be rounded to bfloat16.
    exact = jax.lax.Precision.HIGHEST if values.dtype == jnp.float32 else None
    groups = VALUES // _SIZE
    for group in range(groups):
        first, part = base[0], slice(group * _SIZE, (group + 1) * _SIZE)
        row = jax.lax.broadcasted_iota(jnp.int32, (2 * _SIZE, _SIZE), 0) + first
        hot = jnp.where(row == ranks[:, part], 1.0, 0.0).astype(values.dtype)
        sums[...] += jax.lax.dot(
            hot, values[part], precision=exact, preferred_element_type=jnp.float32
        )

        @pl.when(lasts[turn * groups + group] - first >= _SIZE)
        def _(first=first):
            rows[...] = sums[:_SIZE].astype(rows.dtype)
            place = (
                number[0],
                pl.ds(pl.multiple_of(first, _SIZE), _SIZE),
                pl.ds(pl.multiple_of(column * width, 128), width),
            )
            copy = pltpu.make_async_copy(rows, into.at[place], done)
            copy.start()
            sums[:_SIZE] = sums[_SIZE:]
            sums[_SIZE:] = jnp.zeros((_SIZE, width), jnp.float32)
            base[0] = first + _SIZE
            copy.wait()
