"""Completes prompts with a trained model: a batched prefill, then one token per sequence and step.

Prompts of different lengths are padded to a common power of two, and the cache has a power of two
slots, so few programs are compiled. Padding is behind the text, where nothing sees it, so a prompt
gets the same completion in any batch.

Stages by step distance: token t is read by the host while step t+1 computes on the device.
"""

import copy
import dataclasses
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from stem_jax.config import Config
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.errors import InputError
from stem_jax.generation.buckets import bucket, padded, within
from stem_jax.generation.completion import Completion, Progress
from stem_jax.generation.decode_state import DecodeState, state_places
from stem_jax.generation.sampling import Sampling, sample
from stem_jax.memory.catalogue import memories
from stem_jax.memory.memory import NO_TOKEN
from stem_jax.mesh import BATCH_AXES, axis_size, divided, replicated
from stem_jax.model.cache import LayerCache, NewCache
from stem_jax.model.inputs import Inputs
from stem_jax.model.memory_rows import MemoryRows, last_tokens
from stem_jax.tables.row_source import RowSource, ServedRows
from stem_jax.training.blueprint import ModelDef, Params


class Generator:
    """Compiled programs that complete prompts with one set of parameters."""

    def __init__(
        self,
        config: Config,
        params: Params,
        rows: Mapping[str, RowSource],
        tokenizer: Tokenizer | None,
        mesh: Mesh | None = None,
    ):
        """Args: `rows` of each memory are up to date; without `tokenizer` only the programs can be
        had; `mesh` is where rows and parameters lie, None for one device without a mesh.

        Several devices divide the batch over the batch axes, and the heads of a cache over
        `tensor`.
        """
        # Nothing is differentiated here, so there is nothing to rematerialise.
        model = dataclasses.replace(config.model, remat="none")
        self.config = dataclasses.replace(config, model=model)
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.params = params
        self.rows = MemoryRows(memories(config), rows)
        self._model = ModelDef(self.config, divided(mesh))
        self.shards = 1 if mesh is None else axis_size(mesh, BATCH_AXES)
        # Ids that decode to nothing are never drawn; mostly there are none.
        size = config.model.vocab_size
        absent = [] if tokenizer is None else tokenizer.absent_ids(size)
        self._absent_V = np.isin(np.arange(size), absent) if absent else None
        whole = None if mesh is None else replicated(mesh)
        self.place = lambda array: jax.device_put(array, whole)
        places = whole, None if mesh is None else state_places(model, mesh)
        self.prefill = jax.jit(self._prefill, static_argnames="slots", out_shardings=places)
        self.decode = jax.jit(self._decode, donate_argnames="state", out_shardings=places)

    def with_rows(self, rows: Mapping[str, RowSource]) -> "Generator":
        """The same programs on other rows; rows of the same kind and number compile nothing."""
        other = copy.copy(self)
        other.rows = MemoryRows(self.rows.memories, rows)
        return other

    @property
    def context(self) -> int:
        """Tokens that prompt and completion may have together: the length trained on."""
        return self.config.train.seq_len

    def encode(self, prompt: str, special: bool = False) -> list[int]:
        """See `Tokenizer.encode_prompt`."""
        assert self.tokenizer is not None
        return self.tokenizer.encode_prompt(prompt, special)

    def steps(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Iterator[list[int | None]]:
        """Completes a batch, step by step.

        A sequence ends with a stop id, after `max_new_tokens`, or where it fills the context.

        Args:
            prompts: ids, what every prompt begins with included.
            seeds: one of each sequence, below 2^32; None: those of `sequence_seeds(0, prompts)`.

        Returns:
            An iterator of the new token of each sequence, None for those that have ended.

        Raises:
            InputError: no prompt, one that leaves no room in the context, or an unknown id.
        """
        self.check(prompts, max_new_tokens)
        seeds = sequence_seeds(0, prompts) if seeds is None else seeds
        if len(seeds) != len(prompts) or not all(0 <= seed < 2**32 for seed in seeds):
            raise InputError(
                f"seeds={list(seeds)[:8]} must be one number below 2^32 for each of "
                f"{len(prompts)} prompts"
            )
        limits = [min(max_new_tokens, self.context - len(prompt)) for prompt in prompts]
        scalars = (sampling or Sampling()).scalars()
        return self._steps(prompts, limits, scalars, np.asarray(seeds, np.uint32))

    def complete(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        seed: int = 0,
        batch_size: int = 32,
        on_text: Callable[[int, str], None] | None = None,
        special: bool = False,
    ) -> list[Completion]:
        """Completes prompts, at most `batch_size` at a time.

        Args:
            seed: with the prompt it fixes the sample, whatever else is in the batch; a prompt that
                is given again gets another sample.
            on_text: called with (index of the prompt, piece of its text) as text is made.
            special: see `encode`.

        Raises:
            InputError: see `steps`.
        """
        how = max_new_tokens, sampling, seed, batch_size
        batches = self.batches(prompts, *how, on_text=on_text, special=special)
        return [completion for batch in batches for completion in batch]

    def batches(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        seed: int = 0,
        batch_size: int = 32,
        *,
        on_text: Callable[[int, str], None] | None = None,
        special: bool = False,
        done: int = 0,
        own: slice = slice(None),
    ) -> Iterator[list[Completion]]:
        """`complete`, batch by batch, as each is done.

        Args:
            done: so many of the prompts are left out, which changes nothing for the others.
            own: which of the batches to complete.
        """
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} must be at least 1")
        ids = [self.encode(prompt, special) for prompt in prompts]
        self.check(ids, max_new_tokens)
        seeds = sequence_seeds(seed, ids)
        parts = [slice(first, first + batch_size) for first in range(done, len(ids), batch_size)]
        how = max_new_tokens, sampling, on_text
        return (
            self._batch(part.start, prompts[part], ids[part], seeds[part], *how)
            for part in parts[own]
        )

    def _batch(
        self,
        first: int,
        prompts: Sequence[str],
        ids: Sequence[Sequence[int]],
        seeds: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None,
        on_text: Callable[[int, str], None] | None,
    ) -> list[Completion]:
        tokenizer = self.tokenizer
        assert tokenizer is not None
        batch = [
            Progress(tokenizer, prompt, prompt_ids, max_new_tokens, self.context)
            for prompt, prompt_ids in zip(prompts, ids)
        ]
        for tokens in self.steps(ids, max_new_tokens, sampling, seeds):
            for index, (progress, token) in enumerate(zip(batch, tokens)):
                piece = "" if token is None else progress.push(token)
                if piece and on_text is not None:
                    on_text(first + index, piece)
        return [progress.completion() for progress in batch]

    def _steps(self, prompts, limits: list[int], scalars, seeds_B) -> Iterator[list[int | None]]:
        length = min(bucket(max(map(len, prompts))), self.context)
        last = max(limits) - 1
        # Every shard of the batch has as many; what these say nobody hears.
        missing = -len(prompts) % self.shards
        batch = [*prompts, *[prompts[0]] * missing]
        tokens_BxL = self.place(padded(batch, length))
        lengths_B = np.array([*map(len, batch)], np.int32)
        token_B, state = self.prefill(
            self.params,
            self.rows.serve(tokens_BxL, self.place(within(lengths_B, length))),
            tokens_BxL,
            self.place(lengths_B),
            self.place(np.pad(seeds_B, (0, missing))),
            scalars,
            slots=bucket(length + last),
        )
        stops = () if self.tokenizer is None else self.tokenizer.special.stop_ids
        ended = [False] * len(prompts)
        for step in range(last + 1):
            next_B = None
            if step < last:
                rows = self.rows.serve(token_B[:, None], before_BxR=state.before)
                next_B, state = self.decode(self.params, rows, token_B, scalars, state=state)
            read = np.asarray(token_B).tolist()[: len(prompts)]
            yield [None if end else token for end, token in zip(ended, read)]
            ended = [
                end or token in stops or step + 1 == limit
                for end, token, limit in zip(ended, read, limits)
            ]
            if all(ended):
                return
            token_B = next_B

    def _prefill(self, params, rows, tokens_BxL, lengths_B, seeds_B, scalars, *, slots: int):
        """The first new token [B], and the state after the prompts."""
        begun = [NewCache(slots)] * self.config.model.num_layers
        logits_BxV, read = self.advance(params, rows, tokens_BxL, lengths_B, begun)
        first = DecodeState(*read, seeds_B, jnp.int32(1))
        return self._draw(logits_BxV, seeds_B, jnp.int32(0), scalars), first

    def _decode(self, params, rows, token_B, scalars, *, state: DecodeState):
        """The token [B] that follows `token_B`, and the state after it."""
        ones_B = jnp.ones_like(token_B)
        logits_BxV, read = self.advance(
            params, rows, token_B[:, None], ones_B, state.caches, state.readers, state.before
        )
        following = DecodeState(*read, state.seeds, state.step + 1)
        return self._draw(logits_BxV, state.seeds, state.step, scalars), following

    def _draw(self, logits_BxV, seeds_B, step, scalars):
        return sample(self.drawable(logits_BxV), seeds_B, step, *scalars)

    def drawable(self, logits_BxV: jax.Array) -> jax.Array:
        """The logits, -inf for ids that decode to nothing."""
        if self._absent_V is None:
            return logits_BxV
        return jnp.where(self._absent_V, -jnp.inf, logits_BxV)

    def advance(
        self,
        params: Params,
        rows: Mapping[str, ServedRows],
        tokens_BxL: jax.Array,
        lengths_B: jax.Array,
        caches: list[NewCache] | list[LayerCache],
        readers: list[dict[str, Any]] | None = None,
        before_BxR: jax.Array | None = None,
        segment_ids_BxL: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[list[LayerCache], list[dict[str, Any]], jax.Array | None]]:
        """Reads the first `lengths_B` of L tokens, one or more of each sequence.

        Args:
            caches, readers, before_BxR: see `DecodeState`.
            segment_ids_BxL: of prompts, their documents as rows of training have them, also with
                padding (0) in front: what follows goes on with the last document and knows of no
                other. None: each is one document from the first place on.

        Returns:
            Float32 logits [B, V] after the last that was read, and these three after it.
        """
        model, length = self._model.bind(params), tokens_BxL.shape[1]
        places_BxL = jnp.broadcast_to(jnp.arange(length), tokens_BxL.shape)
        first, positions_BxL, firsts_BxL = caches[0], places_BxL, None
        if isinstance(first, LayerCache):
            positions_BxL = places_BxL + first.lengths[:, None]
        if segment_ids_BxL is None:
            segment_ids_BxL = within(lengths_B, length)
        else:
            segment_ids_BxL = jnp.where(within(lengths_B, length) != 0, segment_ids_BxL, 0)
            firsts_BxL = _firsts(segment_ids_BxL)
            positions_BxL = places_BxL - firsts_BxL
        blocks, index = self.rows.blocks(
            rows, tokens_BxL, segment_ids_BxL, self.config.model.compute_dtype, before_BxR
        )
        inputs = Inputs(tokens_BxL, positions_BxL, segment_ids_BxL, index)
        hidden_BxLxD, longer, _, after = model(inputs, blocks, caches, states=readers)
        assert longer is not None and after is not None
        last_Bx1 = lengths_B[:, None] - 1
        if firsts_BxL is not None:
            first_Bx1 = jnp.take_along_axis(firsts_BxL, last_Bx1, axis=1)
            longer = [cache.beginning_at(first_Bx1[:, 0], lengths_B) for cache in longer]
            tokens_BxL = jnp.where(places_BxL < first_Bx1, NO_TOKEN, tokens_BxL)
        following = last_tokens(tokens_BxL, lengths_B, before_BxR, self.rows.reach)
        last_Bx1xD = jnp.take_along_axis(hidden_BxLxD, last_Bx1[..., None], axis=1)
        return model.logits(last_Bx1xD)[:, 0], (longer, after, following)

    def check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """Raises InputError: see `steps`."""
        if not prompts:
            raise InputError("there is no prompt to complete; give one or more")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens} must be at least 1")
        vocab_size = self.config.model.vocab_size
        for number, prompt in enumerate(prompts, start=1):
            if not 0 < len(prompt) < self.context:
                raise InputError(
                    f"prompt {number} has {len(prompt)} tokens (bos included), the context of "
                    f"train.seq_len={self.context} takes 1 to {self.context - 1} and new ones; "
                    "shorten the prompt, or train with a longer train.seq_len"
                )
            if not (min(prompt) >= 0 and max(prompt) < vocab_size):
                raise InputError(
                    f"prompt {number} has ids from {min(prompt)} to {max(prompt)}, the model knows "
                    f"0 to {vocab_size - 1}; use the tokenizer that it was trained with"
                )


def _firsts(segment_ids_BxL: jax.Array) -> jax.Array:
    """The place at which the document of each position begins, [B, L] int32."""
    before_BxL = jnp.pad(segment_ids_BxL, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    places_L = jnp.arange(segment_ids_BxL.shape[1], dtype=jnp.int32)
    return jax.lax.cummax(jnp.where(segment_ids_BxL != before_BxL, places_L, 0), axis=1)


def sequence_seeds(seed: int, prompts: Sequence[Sequence[int]]) -> list[int]:
    """A seed of each prompt: of `seed`, its ids, and how often it came before in the list."""
    seen: Counter = Counter()
    seeds = []
    for prompt in (tuple(map(int, ids)) for ids in prompts):
        seeds.append(zlib.crc32(repr((seed, seen[prompt], prompt)).encode()))
        seen[prompt] += 1
    return seeds
