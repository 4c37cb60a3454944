"""Rows of large arrays, computed on where they lie, as a TPU kernel.

A gather of rows into a fusion and a scatter of what that gives pass every row through the chip's
memory four times; compiled for v5e they take as long as the arithmetic between them three times.
Here a few rows at a time are copied to the chip, one by one, while those before them are computed
on, and those before these are copied back. Each byte moves once.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Rows of a step, half as many of wide ones, and numbers in one array of theirs, so that with all
# buffers they take half of the 16 MiB that a kernel has.
_ROWS = 16
_NUMBERS = 10240 * 16
# Columns that are computed on at a time: registers hold a dozen intermediate results of them.
_COLUMNS = 512
# Numbers of rows that a call holds beside the scalars of its program: 128 KiB for each list.
_MOST_ROWS = 2**15
_LANES = 128


def can_pass(width: int, numbers: int) -> bool:
    """Whether rows of this width, with so many numbers of each, can be computed on so."""
    fits = width * _ROWS // 2 <= _NUMBERS
    return fits and width % _LANES == 0 and numbers <= _LANES


def read_rows(
    compute: Callable, arrays: Sequence[jax.Array], places_O: jax.Array, numbers_OxK, dtype
) -> jax.Array:
    """[S, O, F] in `dtype`: what `compute` makes of the rows at some places of arrays [S, R, F].

    Args:
        compute: of (rows of each array [N, W], their numbers, a list of K arrays [N, 1]); gives
            [N, W]. It sees some of the rows and some of the columns at a time.
        arrays: float32.
        places_O: int32 in [0, R).
        numbers_OxK: float32.
    """
    found = [
        _call(compute, arrays, *piece, given=None, written_O=None, dtype=dtype)
        for piece in zip(_pieces(places_O), _pieces(numbers_OxK), strict=True)
    ]
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=1)


def update_rows(
    compute: Callable,
    arrays: Sequence[jax.Array],
    places_O: jax.Array,
    written_O: jax.Array,
    numbers_OxK: jax.Array,
    given_SxOxF: jax.Array,
) -> tuple[jax.Array, ...]:
    """The arrays, given away, with what `compute` makes of the rows at some places.

    Args:
        compute: as for `read_rows`, with the given [N, W] between rows and numbers; gives as many
            rows as there are arrays.
        places_O: where rows are read; those that are written must be distinct.
        written_O: bool, which of them are written back.
        given_SxOxF: float32.
    """
    pieces = zip(_pieces(places_O), _pieces(written_O), _pieces(numbers_OxK), strict=True)
    first = 0
    for places, written, numbers in pieces:
        given = jax.lax.slice_in_dim(given_SxOxF, first, first + len(places), axis=1)
        arrays = _call(compute, arrays, places, numbers, given, written, None)
        first += len(places)
    return tuple(arrays)


def _pieces(values_O: jax.Array) -> list[jax.Array]:
    return [values_O[n : n + _MOST_ROWS] for n in range(0, len(values_O), _MOST_ROWS)]


def _call(compute, arrays, places_O, numbers_OxK, given, written_O, dtype):
    (S, _, F), number, count = arrays[0].shape, len(places_O), len(arrays)
    size = _ROWS if F * _ROWS <= _NUMBERS else _ROWS // 2
    steps = -(-number // size)
    behind = steps * size - number
    places = jnp.pad(places_O.astype(jnp.int32), (0, behind))
    updates = written_O is not None
    scalars = [places]
    if updates:
        scalars.append(jnp.pad(written_O.astype(jnp.int32), (0, behind)))
    numbers = jnp.pad(numbers_OxK, ((0, behind), (0, _LANES - numbers_OxK.shape[1])))
    of_rows = pl.BlockSpec((1, size, F), lambda vector, step, *_: (vector, step, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    in_specs = [anywhere] * count
    in_specs.append(pl.BlockSpec((size, _LANES), lambda vector, step, *_: (step, 0)))
    inputs = [*arrays, numbers]
    buffers = [pltpu.VMEM((2, count, size, F), jnp.float32), pltpu.SemaphoreType.DMA((2,))]
    row_bytes = S * number * F * 4
    if updates:
        in_specs.append(of_rows)
        inputs.append(given)
        buffers += buffers
        out_shape = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
        out_specs = [anywhere] * count
        aliases = {len(scalars) + n: n for n in range(count)}
        moved = row_bytes * (2 * count + 1)
    else:
        out_shape, out_specs, aliases = jax.ShapeDtypeStruct((S, number, F), dtype), of_rows, {}
        moved = row_bytes * count + S * number * F * jnp.dtype(dtype).itemsize
    kernel = _updating if updates else _reading
    return pl.pallas_call(
        functools.partial(kernel, compute, count, numbers_OxK.shape[1]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(S, steps),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=buffers,
        ),
        out_shape=out_shape,
        input_output_aliases=aliases,
        # The copies to the chip stand in branches, one for the first step and one for the others.
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved),
        name="row_passes",
    )(*scalars, *inputs)


def _reading(compute, count: int, width: int, places, *refs):
    arrays, (numbers, out, rows, arrived) = refs[:count], refs[count:]
    slot = _bring(arrays, rows, arrived, places)

    def one_part(columns):
        parts = [rows[slot, n, :, columns] for n in range(count)]
        out[0, :, columns] = compute(*parts, _columns(numbers, width)).astype(out.dtype)

    _by_columns(out.shape[-1], one_part)


def _updating(compute, count: int, width: int, places, written, *refs):
    arrays, (numbers, given), refs = refs[:count], refs[count : count + 2], refs[count + 2 :]
    outs, (rows, arrived, fresh, left) = refs[:count], refs[count:]
    slot = _bring(arrays, rows, arrived, places)
    (now, last), size = _now(), rows.shape[2]

    def put(step, slot, act):
        """Acts on the copies of a step's rows back to their places."""
        vector, first = _place(step, size)
        for row in range(size):

            @pl.when(written[first + row] != 0)
            def _(row=row):
                for n, out in enumerate(outs):
                    place = (vector, pl.ds(places[first + row], 1))
                    source = fresh.at[slot, n, pl.ds(row, 1)]
                    act(pltpu.make_async_copy(source, out.at[place], left.at[slot]))

    # What was put here two steps ago must have left.
    @pl.when(now >= 2)
    def _():
        put(now - 2, slot, lambda copy: copy.wait())

    def one_part(columns):
        parts = [rows[slot, n, :, columns] for n in range(count)]
        made = compute(*parts, given[0, :, columns], _columns(numbers, width))
        for n, part in enumerate(made):
            fresh[slot, n, :, columns] = part

    _by_columns(given.shape[-1], one_part)
    put(now, slot, lambda copy: copy.start())

    @pl.when(now == last)
    def _():
        @pl.when(now >= 1)
        def _():
            put(now - 1, 1 - slot, lambda copy: copy.wait())

        put(now, slot, lambda copy: copy.wait())


def _now():
    steps = pl.num_programs(1)
    return pl.program_id(0) * steps + pl.program_id(1), pl.num_programs(0) * steps - 1


def _place(step, size: int):
    """The vector of a step, and the first of its rows."""
    steps = pl.num_programs(1)
    return jax.lax.div(step, steps), jax.lax.rem(step, steps) * size


def _bring(arrays, rows, arrived, places):
    """Starts the copies of the next step's rows, awaits this one's; where in `rows` these are."""
    (now, last), size = _now(), rows.shape[2]
    slot = jax.lax.rem(now, 2)

    def bring(step, slot, act):
        vector, first = _place(step, size)
        for row in range(size):
            for n, array in enumerate(arrays):
                place = (vector, pl.ds(places[first + row], 1))
                target = rows.at[slot, n, pl.ds(row, 1)]
                act(pltpu.make_async_copy(array.at[place], target, arrived.at[slot]))

    @pl.when(now == 0)
    def _():
        bring(now, slot, lambda copy: copy.start())

    @pl.when(now < last)
    def _():
        bring(now + 1, 1 - slot, lambda copy: copy.start())

    bring(now, slot, lambda copy: copy.wait())
    return slot


def _columns(numbers, width: int) -> list[jax.Array]:
    return [numbers[:, n : n + 1] for n in range(width)]


def _by_columns(width: int, one_part) -> None:
    size = next(n for n in (_COLUMNS, _COLUMNS // 2, _LANES) if width % n == 0)

    def one(turn, _):
        one_part(pl.ds(pl.multiple_of(turn * size, _LANES), size))
        return 0

    jax.lax.fori_loop(0, width // size, one, 0)
