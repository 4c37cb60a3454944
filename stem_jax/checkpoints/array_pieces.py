"""Arrays of a checkpoint that are written piece by piece, in Orbax's own format."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers


class PieceHandler(type_handlers.TypeHandler):
    """What handlers of such leaves have in common."""

    def typestr(self) -> str:
        """What a reader without a target gets. As jax.Array, Orbax would ask for shardings."""
        return "np.ndarray"

    async def metadata(self, infos: Sequence[type_handlers.ParamInfo]):
        """Of arrays that were written."""
        return await type_handlers.NumpyHandler().metadata(infos)


async def opened_to_write(
    info: type_handlers.ParamInfo, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: np.dtype
) -> ts.TensorStore:
    """A new array of a checkpoint, for all processes that write parts of it.

    Args:
        shape: of the whole array.
        chunk: what is stored as one value.
    """
    await info.await_path_creation()
    spec = type_handlers.get_json_tspec_write(
        info,
        use_ocdbt=info.is_ocdbt_checkpoint,
        global_shape=shape,
        local_shape=chunk,
        dtype=dtype,
        process_index=jax.process_index(),
        arg=ocp.SaveArgs(),
    )
    if jax.process_index() == 0:
        # One process writes the array's description, the others take it as given.
        await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
    return await ts.open(ts.Spec(spec), open=True, assume_metadata=True, context=info.ts_context)


async def write_piece(target: ts.TensorStore, place: Any, piece: np.ndarray) -> None:
    """Writes a piece that belongs to this write alone, which is why it is not copied."""
    await target[place].write(piece, can_reference_source_data_indefinitely=True)
