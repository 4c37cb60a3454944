"""What readers of n-grams share: all rows of a token, projected into the residual stream."""

from typing import Any

from stem_jax.config import Config
from stem_jax.memory.memory import Memory
from stem_jax.model.kind import LayerCost
from stem_jax.model.reader import Reader


class NGramReader(Reader):
    """A reader whose shapes follow from D, and from the number and width of a token's rows."""

    @classmethod
    def weights(cls, *, embed_dim: int, keys: int, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, by name within the reader."""
        raise NotImplementedError

    @classmethod
    def cost(cls, *, embed_dim: int, keys: int, width: int) -> LayerCost:
        """What one layer's costs."""
        raise NotImplementedError

    @classmethod
    def weights_of(cls, config: Config, memory: Memory) -> dict[str, tuple[int, ...]]:
        """See `Reader`."""
        return cls.weights(**cls.sizes_of(config, memory))

    @classmethod
    def cost_of(cls, config: Config, memory: Memory) -> LayerCost:
        """See `Reader`."""
        return cls.cost(**cls.sizes_of(config, memory))

    @staticmethod
    def sizes_of(config: Config, memory: Memory) -> dict[str, Any]:
        """D, a layer's keys of a token, and the width of their rows."""
        keys = config.ngram.width // memory.width
        return {"embed_dim": config.model.embed_dim, "keys": keys, "width": memory.width}
