"""STEM's memory (arXiv 2601.10639, section 3), read inside the FFN of its layers."""

import dataclasses

from stem_jax.memory.memory import STEM
from stem_jax.memory.token_memory import TokenMemory


@dataclasses.dataclass(frozen=True)
class StemMemory(TokenMemory):
    """Its width is F, the FFN's."""

    name: str = STEM
