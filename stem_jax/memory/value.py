"""Value embeddings: a token's vectors for attention's values (nanochat; arXiv 2609.15126)."""

import dataclasses

from stem_jax.memory.token_memory import TokenMemory

VALUE = "value"


@dataclasses.dataclass(frozen=True)
class ValueMemory(TokenMemory):
    """Its width is K * Dh, that of the values of all KV heads; read by `ValueReader`."""

    name: str = VALUE
    reader: str | None = VALUE
