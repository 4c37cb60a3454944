"""Memories whose key is the token: what they share, whatever a reader does with their rows.

A row holds the token's vector for every layer that reads it, in the order of the layers, so one
gather and one transfer bring all of them.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TokenMemory:
    """See `Memory`. num_keys: V. width: of a vector. layers: that read it, rising."""

    num_keys: int
    width: int
    layers: tuple[int, ...]
    name: str
    reader: str | None = None
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
