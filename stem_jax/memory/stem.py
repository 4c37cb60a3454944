"""STEM's memory (arXiv 2601.10639, section 3): a token is its own key.

A row holds the token's vector for every STEM layer, in the order of the layers, so one gather and
one transfer bring all of them.
"""

import dataclasses

from stem_jax.memory.memory import STEM


@dataclasses.dataclass(frozen=True)
class StemMemory:
    """See `Memory`. num_keys: V. width: F. layers: that read it, rising."""

    num_keys: int
    width: int
    layers: tuple[int, ...]
    name: str = STEM
    reach: int = 0

    @property
    def vectors(self) -> int:
        """S, one for each layer."""
        return len(self.layers)

    def keys(self, tokens_BxL, segment_ids_BxL, before_BxR=None):
        """See `Memory`."""
        del segment_ids_BxL, before_BxR
        return tokens_BxL

    def reads(self, layer: int) -> tuple[slice, int] | None:
        """See `Memory`."""
        return (slice(0, 1), self.layers.index(layer)) if layer in self.layers else None
