"""The programs of the engine: prompts into slots, and one more token of every slot."""

import dataclasses
import enum
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import sample
from stem_jax.mesh import replicated
from stem_jax.model.cache import LayerCache, NewCache
from stem_jax.serving.request import MAX_LOGPROBS, Request
from stem_jax.serving.slot_state import Settings, SlotState, slot_places
from stem_jax.tables.row_source import ServedRows
from stem_jax.training.blueprint import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """New tokens of N sequences.

    tokens: [N] int32. logprobs: [N] float32. top_ids, top_logprobs: [N, M] of the M likeliest
    tokens. NaN is what nobody wants.
    """

    tokens: Any
    logprobs: Any
    top_ids: Any
    top_logprobs: Any


class Wanted(enum.IntEnum):
    """What is said of tokens that are drawn, beside what they are."""

    TOKENS = 0
    LOGPROBS = 1
    TOP = 2

    @classmethod
    def by(cls, requests: Iterable[Request]) -> np.int32:
        """The most that one of them wants."""
        most = max((-1 if r.top_logprobs is None else r.top_logprobs for r in requests), default=-1)
        return np.int32(cls.TOKENS if most < 0 else cls.TOP if most else cls.LOGPROBS)


class Programs:
    """What is compiled for B slots of T places each; the state that they take is donated.

    begin: whole prompts, or the first parts of longer ones. go_on: the next parts. decode: one
    token of every slot that is active.
    """

    def __init__(self, generator: Generator, slots: int):
        self._generator, self._slots = generator, slots
        mesh, model = generator.mesh, generator.config.model
        self._top = min(MAX_LOGPROBS, model.vocab_size)
        self._places = None if mesh is None else slot_places(model, mesh)
        places = None if mesh is None else (replicated(mesh), self._places)
        make = functools.partial(jax.jit, donate_argnames="state", out_shardings=places)
        self.begin = make(self._begin)
        self.go_on = make(self._go_on)
        self.decode = make(self._decode, static_argnames="window")

    @property
    def compiled(self) -> int:
        """How many there are, of all shapes."""
        # Public only in name: jax says so in its own tests, and has nothing else.
        programs: tuple[Any, ...] = (self.begin, self.go_on, self.decode)
        return sum(program._cache_size() for program in programs)

    def empty(self, rows: Mapping[str, ServedRows]) -> SlotState:
        """The state of slots in which nothing is. rows: see `shapes`."""

        def zeros():
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.shapes(rows))

        return jax.jit(zeros, out_shardings=self._places)()

    def shapes(self, rows: Mapping[str, ServedRows]) -> SlotState:
        """The state's, in their places. rows: served for one token of each slot, for theirs."""
        generator, B = self._generator, self._slots

        def begun(params, rows):
            ones_B = jnp.ones(B, jnp.int32)
            caches = [NewCache(generator.context)] * generator.config.model.num_layers
            _, read = generator.advance(params, rows, ones_B[:, None], ones_B, caches)
            settings = Settings(*(jnp.zeros(B, d) for d in ("uint32", "float32", "int32")), ones_B)
            settings = dataclasses.replace(settings, top_p=jnp.ones(B, jnp.float32))
            return SlotState(ones_B[:, None], *read, ones_B, settings)

        placed = jax.jit(begun, out_shardings=self._places)
        return placed.eval_shape(generator.params, rows)

    def _begin(
        self, params: Params, rows, tokens_PxL, lengths_P, slots_P, settings, wanted, state
    ) -> tuple[Drawn, SlotState]:
        """Prompts from their first token on.

        Args:
            slots_P: where they go; past the last slot, nowhere.
            wanted: int32, the most that somebody wants, see `Wanted`.
        """
        caches = [NewCache(tokens_PxL.shape[1])] * self._generator.config.model.num_layers
        logits, read = self._generator.advance(params, rows, tokens_PxL, lengths_P, caches)
        return self._put(logits, read, slots_P, settings, wanted, state)

    def _go_on(
        self, params: Params, rows, tokens_PxL, lengths_P, slots_P, settings, wanted, state
    ) -> tuple[Drawn, SlotState]:
        """The next parts of prompts that have begun in these slots."""
        own = state.sequences(slots_P)
        logits, read = self._generator.advance(params, rows, tokens_PxL, lengths_P, *own)
        return self._put(logits, read, slots_P, settings, wanted, state)

    def _put(self, logits_PxV, read, slots_P, settings: Settings, wanted, state: SlotState):
        drawn = self._draw(logits_PxV, settings, jnp.zeros_like(slots_P), wanted)
        return drawn, state.with_sequences(slots_P, drawn.tokens, read, settings)

    def _decode(
        self, params: Params, rows, active_B, wanted, state: SlotState, window: int
    ) -> tuple[Drawn, SlotState]:
        """One more token of the active slots; the others stay as they are.

        Args:
            window: places that hold the active sequences, with this token.
        """
        one_B = active_B.astype(jnp.int32)
        own = _within(state.caches, window), state.readers, state.before
        logits, read = self._generator.advance(params, rows, state.tokens, one_B, *own)
        read = _within(read[0], None), *read[1:]
        drawn = self._draw(logits, state.settings, state.steps, wanted)
        tokens_Bx1 = jnp.where(active_B[:, None], drawn.tokens[:, None], state.tokens)
        return drawn, SlotState(tokens_Bx1, *read, state.steps + one_B, state.settings)

    def _draw(self, logits_NxV, settings: Settings, steps_N, wanted) -> Drawn:
        logits_NxV = self._generator.drawable(logits_NxV)
        how = settings.temperature, settings.top_k, settings.top_p
        tokens_N = sample(logits_NxV, settings.seeds, steps_N, *how)
        shape = (len(tokens_N), self._top)
        no_top = jnp.zeros(shape, jnp.int32), jnp.full(shape, jnp.nan, jnp.float32)

        def own():
            total_N = jax.nn.logsumexp(logits_NxV, axis=-1)
            own_N = jnp.take_along_axis(logits_NxV, tokens_N[:, None], axis=-1)[:, 0]
            return own_N - total_N, total_N

        def top():
            own_N, total_N = own()
            values_NxM, ids_NxM = jax.lax.top_k(logits_NxV, self._top)
            return own_N, ids_NxM, values_NxM - total_N[:, None]

        nothing_N = jnp.full(len(tokens_N), jnp.nan, jnp.float32)
        ways = [lambda: (nothing_N, *no_top), lambda: (own()[0], *no_top), top]
        return Drawn(tokens_N, *jax.lax.switch(wanted, ways))


def _within(caches: list[LayerCache], window: int | None) -> list[LayerCache]:
    return [dataclasses.replace(cache, window=window) for cache in caches]
