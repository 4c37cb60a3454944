"""Causal attention within documents by tokamax's kernels for NVIDIA GPUs (Hopper, Blackwell).

Nothing as large as [L, L] exists: a query sees the keys from the first of its document to its own,
and blocks without any are skipped. On an H200, forward and backward of 8 x 4096 with 32 heads of 64
and four documents a row take 5.8 ms; cuDNN, which wants a mask of all pairs, takes 15.0.
"""

import importlib.util
import sys

import jax
import jax.numpy as jnp

from stem_jax.kernels import kept_names

# Lengths come in blocks of keys. Python 3.11 gets an older tokamax than newer ones: these compute
# capabilities both have kernels for.
BLOCK = 128
_CAPABILITIES = ("9.0", "10.0")


def missing(device: jax.Device) -> str | None:
    """What a GPU lacks for these kernels; None if nothing."""
    # Of AMD's GPUs a name, such as gfx942.
    capability = device.compute_capability
    if capability not in _CAPABILITIES:
        known = " and ".join(_CAPABILITIES)
        return f"has no kernels for compute capability {capability}, only for {known}"
    if importlib.util.find_spec("tokamax") is None:
        return 'is not installed (pip install "tokamax<0.1")'
    return None


def document_starts(segments_BxL: jax.Array) -> jax.Array:
    """[B, L] int32, the first position of each one's run of equal segment ids."""
    begins_BxL = jnp.diff(segments_BxL, axis=1, prepend=segments_BxL[:, :1] - 1) != 0
    places_BxL = jnp.where(begins_BxL, jnp.arange(segments_BxL.shape[1]), 0)
    return jax.lax.cummax(places_BxL, axis=1).astype(jnp.int32)


def document_attention(
    q_BxLxHxD, k_BxTxKxD, v_BxTxKxD, segments_BxT: jax.Array, slots_L: jax.Array | None = None
) -> jax.Array:
    """[B, L, H, Dh] in bfloat16 as the arguments; a document's positions lie side by side.

    Args:
        segments_BxT: of the keys.
        slots_L: which of the T positions the queries are; None: all, in their order. With them the
            way back skips no blocks.
    """
    return _attention(q_BxLxHxD, k_BxTxKxD, v_BxTxKxD, keys_of(segments_BxT, slots_L))


def keys_of(segments_BxT: jax.Array, slots_L: jax.Array | None):
    """[B, 1, L] the first key of each query, and likewise what is behind its last.

    The latter is None where the queries are at all positions: then it is the next.
    """
    first_keys_BxL = document_starts(segments_BxT)
    if slots_L is None:
        return first_keys_BxL[:, None], None
    first_keys_BxL = first_keys_BxL[:, slots_L]
    return first_keys_BxL[:, None], jnp.broadcast_to(slots_L + 1, first_keys_BxL.shape)[:, None]


@jax.custom_vjp
def _attention(q, k, v, keys):
    return _forward(q, k, v, keys)[0]


def _forward(q, k, v, keys):
    kernel, mask = _kernel(), _mask(*keys)
    out, sums = kernel(q, k, v, mask=mask, return_residuals=True)
    # With both kept, the way back does not need this kernel once more. The library's own gradient
    # hides them from whoever asks for them by name.
    out, sums = jax.tree.map(kept_names.attention, (out, sums))
    return out, (q, k, v, keys, out, sums)


def _backward(kept, gradient):
    *heads, keys, out, sums = kept
    kernel = _kernel()
    bound = kernel.bind(*heads, mask=_mask(*keys))
    options = {name: v for name, v in bound.kwargs.items() if name != "return_residuals"}
    found = kernel.vjp(sums, out, gradient, *bound.args, **options)
    return found["q"], found["k"], found["v"], None


_attention.defvjp(_forward, _backward)


def _mask(first_keys_Bx1xL, ends_Bx1xL):
    from tokamax._src.ops.attention.base import Mask

    return Mask(k_start=first_keys_Bx1xL, k_end=ends_Bx1xL, is_causal=ends_Bx1xL is None)


def _kernel():
    # Imported where a GPU wants it: it takes a second, and others need not have it. Its public
    # function takes no first keys.
    from absl import flags
    from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention

    # Its version for Python 3.11 would read this program's command line for flags of its own.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])
    return PallasMosaicGpuFlashAttention()
