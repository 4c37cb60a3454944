"""Rows laid over a table: the table stays as it is, wherever its rows lie."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from stem_jax.tables.row_source import RowSource, ServedRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OverlaidBlock:
    """The rows of a block and E more, as a compiled program reads them.

    base: the block of the table. extra: [E, S, F] float32. keys: int32 of the shape of the tokens;
    below V a row of the table, V + e is `extra[e]`. vocab_size: V.
    """

    base: ServedRows
    extra: jax.Array
    keys: jax.Array
    vocab_size: int = dataclasses.field(metadata={"static": True})

    @property
    def blocks(self) -> int:
        """See `row_source.ServedRows`."""
        return self.base.blocks

    def block(self, keys_BxL: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
        """See `row_source.ServedRows`; which rows are read was settled by `serve`."""
        keys_BxL = self.keys.reshape(keys_BxL.shape)
        is_extra_BxL = keys_BxL >= self.vocab_size
        rows_SxUxF, inverse_BxL = self.base.block(jnp.where(is_extra_BxL, 0, keys_BxL), dtype)
        S, _, F = rows_SxUxF.shape
        rows_SxPxUxF = rows_SxUxF.reshape(S, self.blocks, -1, F)
        place_BxL = keys_BxL - self.vocab_size + rows_SxPxUxF.shape[2]
        extra_Sx1xExF = self.extra.astype(dtype).swapaxes(0, 1)[:, None]
        extra_SxPxExF = jnp.repeat(extra_Sx1xExF, self.blocks, axis=1)
        rows = jnp.concatenate([rows_SxPxUxF, extra_SxPxExF], axis=2).reshape(S, -1, F)
        return rows, jnp.where(is_extra_BxL, place_BxL, inverse_BxL)


class OverlaidRows:
    """A row source with E rows of its own beside those of another source.

    Keys from V on are its own rows. Token ids can be led to them too, which edits a model: the ids
    of the text, and so the token embedding, stay what they are.
    """

    def __init__(
        self, base: RowSource, vocab_size: int, extra_ExSxF: np.ndarray, token_ids: np.ndarray
    ):
        """Args:
        base: of a model with STEM layers.
        vocab_size: V.
        extra_ExSxF: the rows, float32.
        token_ids: [E] whose row each of them replaces; -1: it is read by its key V + e alone.
        """
        self._base = base
        self._vocab_size = vocab_size
        self._extra = jnp.asarray(extra_ExSxF, jnp.float32)
        keys_K = np.arange(vocab_size + len(extra_ExSxF), dtype=np.int32)
        numbers = np.arange(len(token_ids), dtype=np.int32)
        led = np.asarray(token_ids) >= 0
        keys_K[np.asarray(token_ids)[led]] = vocab_size + numbers[led]
        self._keys = jnp.asarray(keys_K)

    @property
    def room(self) -> int | None:
        """See `row_source.RowSource`."""
        return self._base.room

    def fix_shapes(self, most_keys: int) -> None:
        """See `row_source.RowSource`."""
        self._base.fix_shapes(most_keys)

    def serve(self, keys: jax.Array) -> OverlaidBlock:
        """See `row_source.RowSource`."""
        keys, of_table = _led(self._keys, keys, self._vocab_size)
        return OverlaidBlock(self._base.serve(of_table), self._extra, keys, self._vocab_size)

    def close(self) -> None:
        """See `row_source.RowSource`."""
        self._base.close()


class SequenceKeys:
    """A row source in which each sequence of a batch reads rows of its own for some tokens."""

    def __init__(self, base: OverlaidRows, vocab_size: int, keys: Sequence[Mapping[int, int]]):
        """Args:
        base: has the rows that the keys name. What it serves keeps the keys that it was asked
            for, so that programs can go on naming tokens.
        vocab_size: V.
        keys: of each sequence, the row that is read for a token id if not its own.
        """
        keys_BxV = np.tile(np.arange(vocab_size, dtype=np.int32), (len(keys), 1))
        for row, led in enumerate(keys):
            for token, key in led.items():
                keys_BxV[row, token] = key
        self._base = base
        self._keys_BxV = jnp.asarray(keys_BxV)

    @property
    def room(self) -> int | None:
        """See `row_source.RowSource`."""
        return self._base.room

    def fix_shapes(self, most_keys: int) -> None:
        """See `row_source.RowSource`."""
        self._base.fix_shapes(most_keys)

    def serve(self, keys: jax.Array) -> ServedRows:
        """See `row_source.RowSource`; the first axis of the tokens is the batch."""
        tokens_BxL = keys.reshape(keys.shape[0], -1)
        led_BxL = _led_by_sequence(self._keys_BxV, tokens_BxL)
        return self._base.serve(led_BxL.reshape(keys.shape))

    def close(self) -> None:
        """See `row_source.RowSource`."""
        self._base.close()


@functools.partial(jax.jit, static_argnames="vocab_size")
def _led(keys_K: jax.Array, keys: jax.Array, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """Where keys lead, and the same with row 0 of the table for what is beside it."""
    keys = keys_K[keys]
    return keys, jnp.where(keys >= vocab_size, 0, keys)


@jax.jit
def _led_by_sequence(keys_BxV: jax.Array, tokens_BxL: jax.Array) -> jax.Array:
    return jnp.take_along_axis(keys_BxV, tokens_BxL, axis=1)
