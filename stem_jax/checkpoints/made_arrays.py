"""Arrays that are read piece by piece while Orbax writes them, and are never in memory whole.

What is written is what Orbax writes of a jax.Array of the same values; a checkpoint of them is
restored as any other.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals

from stem_jax.checkpoints.array_pieces import PieceHandler, opened_to_write, write_piece

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


class MadeArrayHandler(PieceHandler):
    """Writes made arrays, one after the other, in one process for all."""

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
    target = await opened_to_write(info, value.shape, value.chunk, value.dtype)
    for place, piece in value.pieces():
        await write_piece(target, place, piece)
