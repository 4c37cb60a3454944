"""Rows of all memories of a model for forward passes without gradients, by what they are read for.

As with a source (`tables.row_source`), there is a part on the host, `serve`, and one inside the
program, `blocks`.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from stem_jax.memory.memory import NO_TOKEN, Memory
from stem_jax.model.inputs import RowIndex
from stem_jax.tables.row_source import ResidentRows, RowSource, ServedRows


class MemoryRows:
    """The row sources of a model's memories, by name."""

    def __init__(self, memories: Mapping[str, Memory], sources: Mapping[str, RowSource]):
        self.memories = memories
        self.sources = sources
        self._keys = {
            name: jax.jit(memory.keys) if memory.reach else memory.keys
            for name, memory in memories.items()
        }

    @property
    def reach(self) -> int:
        """Tokens before its own that some key depends on."""
        return max((memory.reach for memory in self.memories.values()), default=0)

    @property
    def most_tokens(self) -> int | None:
        """Tokens whose rows can be served at a time, whatever they are; None: any number."""
        rooms = {name: source.room for name, source in self.sources.items()}
        return min((n // self._keys_of(name) for name, n in rooms.items() if n), default=None)

    def fix_shapes(self, most_tokens: int) -> None:
        """See `RowSource`; of so many tokens at a time."""
        for name, source in self.sources.items():
            source.fix_shapes(most_tokens * self._keys_of(name))

    def _keys_of(self, name: str) -> int:
        """Keys of a token."""
        one = np.zeros((1, 1), np.int32)
        return np.size(self.memories[name].keys(one, one + 1))

    def serve(
        self,
        tokens_BxL: jax.Array,
        segment_ids_BxL: jax.Array | None = None,
        before_BxR: jax.Array | None = None,
        keys: Mapping[str, jax.Array] | None = None,
    ) -> dict[str, ServedRows]:
        """What a program takes that reads rows for these tokens; see `Memory.keys`.

        Args:
            segment_ids_BxL: None: all tokens of a sequence are of one document.
            keys: of some memories, in place of the tokens' own.
        """
        served = {}
        for name, source in self.sources.items():
            if keys is not None and name in keys:
                asked = keys[name]
            elif isinstance(source, ResidentRows):
                # It does not look, and nothing waits for keys.
                asked = tokens_BxL
            else:
                if segment_ids_BxL is None:
                    segment_ids_BxL = jnp.ones_like(tokens_BxL)
                before = _last(before_BxR, self.memories[name].reach)
                asked = self._keys[name](tokens_BxL, segment_ids_BxL, before)
            served[name] = source.serve(asked)
        return served

    def blocks(
        self,
        served: Mapping[str, ServedRows],
        tokens_BxL: jax.Array,
        segment_ids_BxL: jax.Array,
        dtype,
        before_BxR: jax.Array | None = None,
        keys: Mapping[str, jax.Array] | None = None,
    ) -> tuple[dict[str, jax.Array], dict[str, RowIndex]]:
        """The row blocks of what was served for the same arguments, and where its rows are."""
        rows, index = {}, {}
        for name, source in served.items():
            if keys is not None and name in keys:
                asked = keys[name]
            else:
                memory = self.memories[name]
                asked = memory.keys(tokens_BxL, segment_ids_BxL, _last(before_BxR, memory.reach))
            rows[name], inverse = source.block(asked, dtype)
            index[name] = RowIndex(inverse)
        return rows, index


def _last(before_BxR: jax.Array | None, reach: int) -> jax.Array | None:
    return None if before_BxR is None or not reach else before_BxR[:, -reach:]


@functools.partial(jax.jit, static_argnames="reach")
def last_tokens(
    tokens_BxL: jax.Array, lengths_B: jax.Array, before_BxR: jax.Array | None, reach: int
) -> jax.Array | None:
    """The `reach` tokens before what follows the first `lengths_B` of each sequence.

    NO_TOKEN stands before a text's first. None without reach.
    """
    if not reach:
        return None
    if before_BxR is None:
        before_BxR = jnp.full((len(tokens_BxL), reach), NO_TOKEN, tokens_BxL.dtype)
    both = jnp.concatenate([before_BxR, tokens_BxL], axis=1)
    places_BxR = lengths_B[:, None] + jnp.arange(reach)
    return jnp.take_along_axis(both, places_BxR, axis=1)
