"""Per-layer embeddings: a token's vectors for a gate behind each FFN (Gemma 3n and 4)."""

import dataclasses

from stem_jax.memory.token_memory import TokenMemory

PER_LAYER = "per_layer"


@dataclasses.dataclass(frozen=True)
class PerLayerMemory(TokenMemory):
    """Its width P is its own, 256 in Gemma; read by `PerLayerReader`."""

    name: str = PER_LAYER
    reader: str | None = PER_LAYER
