"""Engram (arXiv 2601.07372): rows of n-grams enter the residual stream through a gate.

    k = W_K e,  v = W_V e                                 e: the token's rows, one behind the other
    r = <norm(x), norm(k)> / sqrt(D)
    u = sigmoid(sign(r) sqrt(|r|)) v
    x += u + silu(convolution(norm(u)))

The convolution is causal and has one filter of 4 taps for each of D channels, as many positions
apart as the longest n-gram has tokens. It ends where a document begins, and starts with zeros. All
this is transformers' `qwen4_exp` with one residual stream, but for documents: its convolution sees
those before in a row.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from stem_jax.config import Config
from stem_jax.context_order import in_sequence_order
from stem_jax.context_order import slots as context_slots
from stem_jax.memory.memory import Memory
from stem_jax.mesh import CONTEXT, constrain_tokens
from stem_jax.model.kind import LayerCost
from stem_jax.model.layers import RMSNorm
from stem_jax.model.ngram_reader import NGramReader
from stem_jax.model.reader import BEFORE_ATTENTION
from stem_jax.model.row_projection import RowProjection

# Under the root, where its slope has no end.
_LEAST = 1e-6


class ShortConvolution(nnx.Module):
    """y_i = sum_t w_t x_{i - (T - 1 - t) N}, channel by channel, within documents."""

    def __init__(self, embed_dim: int, taps: int, dilation: int):
        self.kernel = nnx.Param(jnp.zeros((taps, embed_dim)), logical_axes=("taps", "norm"))
        self.taps, self.dilation = taps, dilation

    def __call__(self, x_BxLxD, segment_ids_BxL, state):
        """y [B, L, D] in float32, and the state after the last position that is no padding.

        Args:
            x_BxLxD: zero at padding.
            state: [B, (T - 1) N, D], x before the first position, of its document; None: nothing.
        """
        B, L, D = x_BxLxD.shape
        past = (self.taps - 1) * self.dilation
        if state is None:
            state = jnp.zeros((B, past, D), x_BxLxD.dtype)
        seen = jnp.concatenate([state.astype(x_BxLxD.dtype), x_BxLxD], 1)
        before = jnp.repeat(segment_ids_BxL[:, :1], past, 1)
        segments = jnp.concatenate([before, segment_ids_BxL], 1)
        y = 0.0
        for tap, kernel_D in enumerate(self.kernel[...].astype(jnp.float32)):
            there = slice(tap * self.dilation, tap * self.dilation + L)
            same = (segments[:, there] == segment_ids_BxL)[..., None]
            y += kernel_D * jnp.where(same, seen[:, there], 0).astype(jnp.float32)
        places = jnp.arange(1, L + 1)
        read_B = jnp.max(jnp.where(segment_ids_BxL != 0, places, 0), 1)
        last = read_B[:, None] + jnp.arange(past)
        numbers = jnp.take_along_axis(segments, last, 1, mode="clip")
        # All of them are there.
        kept = jnp.take_along_axis(seen, last[..., None], 1, mode="clip")
        return y, jnp.where((numbers == numbers[:, -1:])[..., None], kept, 0)


class Engram(NGramReader):
    """See above."""

    site = BEFORE_ATTENTION
    silent = ("value_proj.kernel",)

    def __init__(
        self,
        *,
        embed_dim: int,
        keys: int,
        width: int,
        max_order: int,
        norm_eps: float,
        taps: int = 4,
        base_std: float | None = None,
        factor: float = 1.0,
        zero_values: bool = False,
        mesh: Mesh | None,
        rngs: nnx.Rngs,
    ):
        """Of `keys` rows of `width` for a token, of n-grams up to `max_order`.

        Args:
            base_std: of projections; None: one over the square root of the numbers read.
            factor: divides that of W_V, which goes into the residual stream.
            zero_values: W_V begins at zero, so that a trained backbone begins as it was.
        """
        shape, std = (keys, width, embed_dim), base_std or (keys * width) ** -0.5
        self.key_proj = RowProjection(shape, std, rngs=rngs)
        self.value_proj = RowProjection(shape, 0.0 if zero_values else std / factor, rngs=rngs)
        self.key_norm = RMSNorm(embed_dim, norm_eps)
        self.query_norm = RMSNorm(embed_dim, norm_eps)
        self.conv_norm = RMSNorm(embed_dim, norm_eps)
        self.conv = ShortConvolution(embed_dim, taps, max_order)
        self.mesh = mesh

    @classmethod
    def of(cls, config: Config, memory: Memory, mesh: Mesh | None, *, rngs: nnx.Rngs):
        """See `Reader`."""
        model, sizes = config.model, cls.sizes_of(config, memory)
        return cls(
            **sizes,
            max_order=config.ngram.max_order,
            norm_eps=model.norm_eps,
            base_std=model.init_base_std,
            mesh=mesh,
            rngs=rngs,
        )

    @classmethod
    def weights(
        cls, *, embed_dim: int, keys: int, width: int, taps: int = 4
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, by name within the reader."""
        norms = ("key_norm", "query_norm", "conv_norm")
        return {
            "key_proj.kernel": (keys, width, embed_dim),
            "value_proj.kernel": (keys, width, embed_dim),
            **{f"{name}.scale": (embed_dim,) for name in norms},
            "conv.kernel": (taps, embed_dim),
        }

    @classmethod
    def cost(cls, *, embed_dim: int, keys: int, width: int, taps: int = 4) -> LayerCost:
        """What one layer's costs."""
        D, row = embed_dim, keys * width
        shapes = cls.weights(embed_dim=D, keys=keys, width=width, taps=taps).values()
        weights = sum(map(math.prod, shapes))
        # Norms in four each, product and sum of the gate, times v; taps and the sums between them;
        # silu in four; two sums; masks of each tap, and of padding. Of the gate itself: scale,
        # absolute, maximum, sign, sigmoid.
        elementwise = (12 + 3 + 2 * taps - 1 + 4 + 2 + taps + 1) * D + 7
        return LayerCost(weights, weights, 2 * row * D, elementwise, row)

    @staticmethod
    def state_shape(*, embed_dim: int, max_order: int, taps: int = 4) -> tuple[int, int]:
        """Of what decoding carries for a sequence, in the compute dtype."""
        return (taps - 1) * max_order, embed_dim

    def __call__(self, x_BxLxD, embedded_BxLxD, rows_BxLxKxF, segment_ids_BxL, state):
        """The residual stream with what is added to it.

        Args:
            x_BxLxD: residual stream, not normed.
            embedded_BxLxD: not read.
            rows_BxLxKxF: of the token's n-grams; any numbers at padding.
            segment_ids_BxL: numbers of documents, 0 at padding, where x stays as it is.
            state: [B, (T - 1) N, D], what the call before has returned; None where rows begin.

        Returns:
            [B, L, D] in the dtype of x, and the state after each sequence's last position that is
            no padding.
        """
        D, dtype = x_BxLxD.shape[-1], x_BxLxD.dtype
        rows_BxLxKxF = rows_BxLxKxF.astype(dtype)
        # Devices of `tensor` add up what their columns give, before the norm.
        key_BxLxD = constrain_tokens(self.key_proj(rows_BxLxKxF), self.mesh)
        value_BxLxD = constrain_tokens(self.value_proj(rows_BxLxKxF), self.mesh)
        product_BxLxD = self.query_norm(x_BxLxD) * self.key_norm(key_BxLxD)
        gate_BxL = _gate(jnp.sum(product_BxLxD, -1, dtype=jnp.float32) * D**-0.5)
        real_BxLx1 = segment_ids_BxL[..., None] != 0
        gated_BxLxD = jnp.where(real_BxLx1, gate_BxL[..., None].astype(dtype) * value_BxLxD, 0)
        # The norm of zeros is zero, so padding stays it.
        normed_BxLxD = self.conv_norm(gated_BxLxD)
        # Sequences of a call with a state, those of decoding, are divided over no devices.
        devices = 1 if self.mesh is None or state is not None else self.mesh.shape[CONTEXT]
        normed_BxLxD, segments_BxL = (
            in_sequence_order(a, 1, devices) for a in (normed_BxLxD, segment_ids_BxL)
        )
        mixed_BxLxD, state = self.conv(normed_BxLxD, segments_BxL, state)
        if devices > 1:
            places = context_slots(mixed_BxLxD.shape[1], devices)
            mixed_BxLxD = constrain_tokens(mixed_BxLxD[:, places], self.mesh)
        return x_BxLxD + gated_BxLxD + jax.nn.silu(mixed_BxLxD).astype(dtype), state


def _gate(r: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(jnp.sign(r) * jnp.sqrt(jnp.maximum(jnp.abs(r), _LEAST)))
