"""Arrays that are read piece by piece while Orbax writes them, and are never in memory whole.

What is written is what Orbax writes of a jax.Array of the same values; a checkpoint of them is
restored as any other.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals

# Of a piece, which is in memory a few times: read, and compressed.
_PIECE_BYTES = 2**24


@dataclasses.dataclass(frozen=True, eq=False)
class MadeArray:
    """A leaf of a checkpoint.

    open: gives what has the values; asked for parts of its first axis by a slice, and for a scalar
    by (). It is let go when all are written.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    open: Callable[[], Any]

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: Any) -> "MadeArray":
        """An array of zeros."""
        return cls(shape, np.dtype(dtype), lambda: np.broadcast_to(np.zeros((), dtype), shape))

    @property
    def chunk(self) -> tuple[int, ...]:
        """What is stored as one value."""
        if not self.shape:
            return ()
        row_bytes = self.dtype.itemsize * math.prod(self.shape[1:])
        return max(1, min(self.shape[0], _PIECE_BYTES // max(1, row_bytes))), *self.shape[1:]

    def pieces(self) -> Iterator[tuple[Any, np.ndarray]]:
        """(place, values) of all chunks."""
        source = self.open()
        if not self.shape:
            yield (), np.asarray(source[()], self.dtype)
            return
        for start in range(0, self.shape[0], self.chunk[0]):
            place = slice(start, min(start + self.chunk[0], self.shape[0]))
            yield place, np.ascontiguousarray(source[place], self.dtype)


class MadeArrayHandler(type_handlers.TypeHandler):
    """Writes made arrays, one after the other, in one process for all."""

    def typestr(self) -> str:
        """What a reader without a target gets, see `store_handler`."""
        return "np.ndarray"

    async def metadata(self, infos: Sequence[type_handlers.ParamInfo]):
        """Of arrays that were written."""
        return await type_handlers.NumpyHandler().metadata(infos)

    async def serialize(
        self,
        values: Sequence[MadeArray],
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ):
        """Begins to write on a thread."""
        del args

        async def write_all():
            for value, info in zip(values, infos, strict=True):
                await _write(value, info)

        return [CommitFutureAwaitingContractedSignals(write_all(), name="made_arrays")]

    async def deserialize(self, infos, args=None):
        """Nobody asks for one: what was written is read as any other array."""
        raise NotImplementedError


async def _write(value: MadeArray, info: type_handlers.ParamInfo) -> None:
    await info.await_path_creation()
    spec = type_handlers.get_json_tspec_write(
        info,
        use_ocdbt=info.is_ocdbt_checkpoint,
        global_shape=value.shape,
        local_shape=value.chunk,
        dtype=value.dtype,
        process_index=jax.process_index(),
        arg=ocp.SaveArgs(),
    )
    target = await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
    for place, piece in value.pieces():
        # No copy: the piece belongs to this write alone.
        await target[place].write(piece, can_reference_source_data_indefinitely=True)
