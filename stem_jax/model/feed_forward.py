"""The kinds of layers that there are; see `kind` for what one is.

A new one is a file with its module, an entry here, and a key of the model section that lists its
layers (`config_keys.Key.kind`).
"""

from stem_jax.config import ModelConfig
from stem_jax.model.ffn import DenseFFN, StemFFN
from stem_jax.model.hash_moe import HashExperts
from stem_jax.model.kind import FeedForward
from stem_jax.model.layer_plan import layer_kinds

KINDS: dict[str, type[FeedForward]] = {
    "dense": DenseFFN,
    "stem": StemFFN,
    "hash_moe": HashExperts,
}


def kinds_of(config: ModelConfig) -> list[type[FeedForward]]:
    """The kind of each layer."""
    return [KINDS[name] for name in layer_kinds(config)]
