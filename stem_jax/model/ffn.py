"""The gated FFN; dense and STEM differ in where its gate and up values come from."""

import dataclasses
import functools
import math

import jax
from flax import nnx
from jax.sharding import Mesh

from stem_jax.config import ModelConfig
from stem_jax.model.kind import Aux, FeedForward, LayerCost, Read
from stem_jax.model.layers import Linear


class GatedFFN(FeedForward):
    """y = W_down(silu(gate) * up), each of the two a projection of x or the token's vector."""

    # Those of `inward`; the other is None.
    gate_proj: Linear
    up_proj: Linear

    @classmethod
    def inward(cls, config: ModelConfig) -> tuple[str, ...]:
        """The projections of x that there are."""
        raise NotImplementedError

    def __init__(self, config: ModelConfig, factor: float, mesh: Mesh | None, *, rngs: nnx.Rngs):
        D, F = config.embed_dim, config.ffn_dim
        in_std = config.init_base_std or D**-0.5
        out_std = (config.init_base_std or F**-0.5) / factor
        make = functools.partial(Linear, rngs=rngs, float8=config.matmul_dtype == "float8")
        for name in ("gate_proj", "up_proj"):
            there = name in self.inward(config)
            made = make((D, F), ("embed", "ffn"), in_std, 3 * in_std) if there else None
            setattr(self, name, made)
        # [D, F] like the others, so that the weight gradient turns the narrow operand and not the
        # [B, L, F] activations: on CPUs that turn cost a tenth of the step.
        self.down_proj = make((D, F), ("embed", "ffn"), out_std, 3 * out_std, output_first=True)

    @classmethod
    def weights(cls, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """See `FeedForward`."""
        shape = (config.embed_dim, config.ffn_dim)
        return {f"{name}.kernel": shape for name in (*cls.inward(config), "down_proj")}

    @classmethod
    def cost(cls, config: ModelConfig) -> LayerCost:
        """Every token multiplies with all weights once."""
        weights = sum(map(math.prod, cls.weights(config).values()))
        # silu(x) = x / (1 + exp(-x)) in four, times the up value.
        return LayerCost(weights, weights, weights, elementwise=5 * config.ffn_dim)


class DenseFFN(GatedFFN):
    """y = W_down(silu(W_gate x) * W_up x)."""

    @classmethod
    def inward(cls, config: ModelConfig) -> tuple[str, ...]:
        """See `GatedFFN`."""
        return "gate_proj", "up_proj"

    def __call__(self, x_BxLxD: jax.Array, read: Read) -> tuple[jax.Array, Aux]:
        """Reads nothing but x."""
        up_BxLxF = self.up_proj(x_BxLxD)
        return self.down_proj(gated(self.gate_proj(x_BxLxD), up_BxLxF)), Aux()


# Of each `model.stem_site`, the projections of x beside the row.
SITES = {"up": ("gate_proj",), "gate": ("up_proj",), "up_add": ("gate_proj", "up_proj")}


class StemFFN(GatedFFN):
    """The token's row U[t] at a site; the first is the published one (eq. 3).

    up: y = W_down(silu(W_gate x) * U[t]). gate: y = W_down(silu(U[t]) * W_up x). up_add:
    y = W_down(silu(W_gate x) * (W_up x + U[t])).
    """

    def __init__(self, config: ModelConfig, factor: float, mesh: Mesh | None, *, rngs: nnx.Rngs):
        super().__init__(config, factor, mesh, rngs=rngs)
        self.site = config.stem_site

    @classmethod
    def inward(cls, config: ModelConfig) -> tuple[str, ...]:
        """See `GatedFFN`."""
        return SITES[config.stem_site]

    @classmethod
    def cost(cls, config: ModelConfig) -> LayerCost:
        """That of the weights that there are, and a row."""
        cost, F = super().cost(config), config.ffn_dim
        added = F if config.stem_site == "up_add" else 0
        return dataclasses.replace(cost, elementwise=cost.elementwise + added, row=F)

    def __call__(self, x_BxLxD: jax.Array, read: Read) -> tuple[jax.Array, Aux]:
        """Reads the layer's vector of each token."""
        gate_BxLxF = up_BxLxF = read.values
        if self.site == "gate":
            up_BxLxF = self.up_proj(x_BxLxD)
        else:
            gate_BxLxF = self.gate_proj(x_BxLxD)
        if self.site == "up_add":
            up_BxLxF = self.up_proj(x_BxLxD) + up_BxLxF
        return self.down_proj(gated(gate_BxLxF, up_BxLxF)), Aux()


@jax.custom_vjp
def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, made once, as its gradients are.

    A TPU would fuse each into the two or three matmuls that read it, which then wait for their
    operands: the gradients of one dense FFN of the 1B shape took 18 M cycles more of 130 on v5e.
    """
    return jax.lax.optimization_barrier(_gate_times_up(gate, up))


def _gate_times_up(gate, up):
    return jax.nn.silu(gate) * up


def _gated_backward(kept, gradient):
    _, pull = jax.vjp(_gate_times_up, *kept)
    return jax.lax.optimization_barrier(pull(gradient))


gated.defvjp(lambda gate, up: (gated(gate, up), (gate, up)), _gated_backward)
