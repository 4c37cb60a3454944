"""What lies on the devices of all slots, one sequence in each."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from stem_jax.config import ModelConfig
from stem_jax.generation.decode_state import cache_places
from stem_jax.mesh import batch_sharding, replicated
from stem_jax.model.cache import LayerCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """How the tokens of each of N sequences are drawn, see `Sampling`.

    seeds: [N] uint32. temperature, top_p: [N] float32. top_k: [N] int32.
    """

    seeds: Any
    temperature: Any
    top_k: Any
    top_p: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotState:
    """Of B slots what a step replaces.

    tokens: [B, 1] int32, the last of each sequence, which no cache has yet. caches, readers,
    before: as in `DecodeState`. steps: [B] int32, tokens drawn so far of each.
    """

    tokens: jax.Array
    caches: list[LayerCache]
    readers: list[dict[str, Any]]
    before: jax.Array | None
    steps: jax.Array
    settings: Settings

    def sequences(self, slots_P: jax.Array) -> tuple[list[LayerCache], list[dict[str, Any]], Any]:
        """Caches, readers' states and tokens before, of the sequences in these slots."""
        own = self.caches, self.readers, self.before
        return jax.tree.map(lambda x: x.at[slots_P].get(mode="clip"), own)

    def with_sequences(
        self,
        slots_P: jax.Array,
        tokens_P: jax.Array,
        read: tuple[list[LayerCache], list[dict[str, Any]], Any],
        settings: Settings,
    ) -> "SlotState":
        """P sequences put into slots: what is past the last slot is dropped.

        Args:
            tokens_P: the first drawn of each.
            read: caches, of no more places than here, readers' states and tokens before.
        """

        def put(held, new):
            place = slots_P
            if new.ndim == 4 and new.shape[2] < held.shape[2]:
                place = slots_P, slice(None), slice(new.shape[2])
            return held.at[place].set(new.astype(held.dtype), mode="drop")

        own = self.tokens, (self.caches, self.readers, self.before), self.steps, self.settings
        new = tokens_P[:, None], read, jnp.ones_like(tokens_P), settings
        tokens, read, steps, settings = jax.tree.map(put, own, new)
        return SlotState(tokens, *read, steps, settings)


def slot_places(model: ModelConfig, mesh: Mesh) -> SlotState:
    """A state with shardings for arrays."""
    batch: Any = batch_sharding(mesh)
    whole: Any = replicated(mesh)
    return SlotState(whole, cache_places(model, mesh), batch, batch, whole, whole)
