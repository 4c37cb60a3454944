"""LoRA (arXiv 2106.09685): beside the blocks' projections, frozen, adapters of low rank that train.

y = W x + alpha / rank * B A x. A begins uniform within 1 / sqrt(in), as PEFT's, and B with zeros,
so that a run begins as what it begins with. The factors lie as the projection's sides do:

    blocks.0.attention.q_proj.adapter.down   A, [in, rank]
    blocks.0.attention.q_proj.adapter.up     B, [rank, out]
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from flax import nnx

from stem_jax.config import Config
from stem_jax.lora_targets import LORA_TARGETS
from stem_jax.model.draws import parameter_key
from stem_jax.model.feed_forward import kinds_of
from stem_jax.model.layers import Linear
from stem_jax.parts import part

_OF_ADAPTERS = ".adapter."
RANK = "rank"


class Adapter(nnx.Module):
    """scale * (x A) B."""

    def __init__(self, linear: Linear, rank: int, scale: float, name: str, seed: int):
        """Args:
        linear: the projection beside which it stands.
        name: of the projection, by which the first numbers are drawn.
        """
        size, axes = linear.kernel.get_value().shape, linear.kernel.get_metadata()["logical_axes"]
        if linear.output_first:
            size, axes = size[::-1], axes[::-1]
        down, up = factors(name)
        self.down = nnx.Param(
            first_factor(down, (size[0], rank), seed), logical_axes=(axes[0], RANK)
        )
        self.up = nnx.Param(first_factor(up, (rank, size[1]), seed), logical_axes=(RANK, axes[1]))
        self.scale = scale

    @part("block_matmuls")
    def __call__(self, x: jax.Array) -> jax.Array:
        down, up = (factor[...].astype(x.dtype) for factor in (self.down, self.up))
        return (x @ down) @ up * self.scale


def first_factor(name: str, shape: tuple[int, ...], seed: int) -> jax.Array:
    """What a factor begins with, whatever else the model has."""
    if name.endswith("up"):
        return jnp.zeros(shape, jnp.float32)
    bound = shape[0] ** -0.5
    return jax.random.uniform(parameter_key(seed, name), shape, jnp.float32, -bound, bound)


def add_adapters(blocks: Iterable[nnx.Module], config: Config) -> None:
    """Puts an adapter beside each target that a block has; nothing with `lora.rank` 0."""
    lora = config.lora
    for layer, block in enumerate(blocks) if lora.rank else ():
        for target in lora.targets:
            of = LORA_TARGETS[target]
            linear = getattr(getattr(block, of), target, None)
            # A STEM layer has no up projection, and experts are none.
            if isinstance(linear, Linear):
                name = f"blocks.{layer}.{of}.{target}"
                linear.adapter = Adapter(linear, lora.rank, lora.scale, name, config.train.seed)


def is_of_adapters(name: str) -> bool:
    """Whether a parameter, by layer or of a state, is a factor of an adapter."""
    return _OF_ADAPTERS in name


def adapters(names: Iterable[str]) -> list[str]:
    """The projections beside which there are adapters, by the names of all parameters by layer."""
    return [n.partition(_OF_ADAPTERS)[0] for n in names if n.endswith(f"{_OF_ADAPTERS}down")]


def factors(projection: str) -> tuple[str, str]:
    """The names of A and B beside a projection."""
    return f"{projection}{_OF_ADAPTERS}down", f"{projection}{_OF_ADAPTERS}up"


def is_output_first(projection: str) -> bool:
    """Whether the kernel of a projection is [out, in]; see `ffn.GatedFFN`."""
    return projection.endswith(".down_proj")


def adapter_weights(config: Config) -> int:
    """Numbers of all adapters; a token multiplies with each once."""
    model, lora, total = config.model, config.lora, 0
    D, Dh = model.embed_dim, model.head_dim
    widths = {"q_proj": model.num_heads, "o_proj": model.num_heads}
    for kind in kinds_of(model) if lora.rank else ():
        weights = kind.weights(model)
        for target in lora.targets:
            if LORA_TARGETS[target] == "attention":
                sides: tuple[int, ...] = (D, Dh * widths.get(target, model.num_kv_heads))
            else:
                sides = weights.get(f"{target}.kernel", ())
            # Experts have a third.
            total += lora.rank * sum(sides) if len(sides) == 2 else 0
    return total


def trained_by(config: Config) -> Callable[[str], bool]:
    """Whether steps that train the backbone change a parameter, by layer or of a state."""
    return is_of_adapters if config.lora.rank else lambda name: True
