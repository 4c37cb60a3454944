"""What decoding carries from token to token."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stem_jax.config import ModelConfig
from stem_jax.mesh import BATCH_AXES, batch_sharding, replicated
from stem_jax.model.cache import LayerCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What a decode step replaces.

    caches: one per layer. readers: see `Outputs.states`. before: [B, R] int32, the tokens before
    the next that keys of rows depend on; None without such. seeds: [B] uint32. step: scalar int32,
    tokens drawn so far.
    """

    caches: list[LayerCache]
    readers: list[dict[str, Any]]
    before: jax.Array | None
    seeds: jax.Array
    step: jax.Array


def state_places(model: ModelConfig, mesh: Mesh) -> DecodeState:
    """A state with shardings for arrays."""
    batch: Any = batch_sharding(mesh)
    whole: Any = replicated(mesh)
    return DecodeState(cache_places(model, mesh), batch, batch, whole, whole)


def cache_places(model: ModelConfig, mesh: Mesh) -> list[LayerCache]:
    """Caches of the layers with shardings for arrays."""
    # Of heads that several devices share, each has all.
    heads = "tensor" if model.num_kv_heads % mesh.shape["tensor"] == 0 else None
    slots: Any = NamedSharding(mesh, PartitionSpec(BATCH_AXES, heads, None, None))
    batch: Any = batch_sharding(mesh)
    return [LayerCache(slots, slots, batch)] * model.num_layers
