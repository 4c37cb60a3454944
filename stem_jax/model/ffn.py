"""The gated FFN; dense and STEM differ in where the up values come from, and nowhere else."""

import functools

import jax
from flax import nnx

from stem_jax.config import ModelConfig
from stem_jax.model.layers import Linear


class GatedFFN(nnx.Module):
    """y = W_down(silu(W_gate x) * up), up = W_up x (dense) or the token's row (STEM, eq. 3)."""

    def __init__(self, config: ModelConfig, layer: int, factor: float, *, rngs: nnx.Rngs):
        D, F = config.embed_dim, config.ffn_dim
        in_std = config.init_base_std or D**-0.5
        out_std = (config.init_base_std or F**-0.5) / factor
        inward = ("embed", "ffn")
        make = functools.partial(Linear, rngs=rngs, float8=config.matmul_dtype == "float8")
        self.gate_proj = make((D, F), inward, in_std, 3 * in_std)
        dense = layer not in config.stem_layers
        self.up_proj = make((D, F), inward, in_std, 3 * in_std) if dense else None
        # [D, F] like the others, so that the weight gradient turns the narrow operand and not the
        # [B, L, F] activations: on CPUs that turn cost a tenth of the step.
        self.down_proj = make((D, F), inward, out_std, 3 * out_std, output_first=True)

    def __call__(self, x_BxLxD: jax.Array, up_BxLxF: jax.Array | None) -> jax.Array:
        """Args: `up_BxLxF` are the rows of a STEM layer, None for a dense one."""
        if self.up_proj is not None:
            up_BxLxF = self.up_proj(x_BxLxD)
        return self.down_proj(_gated(self.gate_proj(x_BxLxD), up_BxLxF))


@jax.custom_vjp
def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
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


_gated.defvjp(lambda gate, up: (_gated(gate, up), (gate, up)), _gated_backward)
