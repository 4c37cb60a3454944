"""Causal attention within documents as plain products, whole or in chunks of queries."""

import functools

import jax
import jax.numpy as jnp

# Queries of a chunk: float32 scores [B, H, 64, L] are the largest array that there is then.
_CHUNK = 64


def document_mask(q_segments_BxL, kv_segments_BxT, q_slots_L) -> jax.Array:
    """Boolean mask [B, 1, L, T]: same document, and not ahead of the query's slot."""
    kv_slots_T = jnp.arange(kv_segments_BxT.shape[1])
    causal_LxT = kv_slots_T[None, :] <= q_slots_L[:, None]
    same_BxLxT = q_segments_BxL[:, :, None] == kv_segments_BxT[:, None, :]
    return (same_BxLxT & causal_LxT)[:, None]


def einsum_attention(q_BxLxHxD, k_BxTxKxD, v_BxTxKxD, mask_Bx1xLxT):
    """Softmax attention with float32 scores; query head h uses KV head h // (H / K).

    Heads come first before the products: on CPUs that takes two thirds of the time of
    jax.nn.dot_product_attention, forward and backward.
    """
    B, L, H, Dh = q_BxLxHxD.shape
    K = k_BxTxKxD.shape[2]
    q_BxKxGxLxD = q_BxLxHxD.reshape(B, L, K, H // K, Dh).transpose(0, 2, 3, 1, 4)
    k_BxKxTxD, v_BxKxTxD = (x.transpose(0, 2, 1, 3) for x in (k_BxTxKxD, v_BxTxKxD))
    scores = jnp.einsum(
        "bkgld,bktd->bkglt", q_BxKxGxLxD, k_BxKxTxD, preferred_element_type=jnp.float32
    )
    # Finite, so that a row without any visible slot gives a mean and not NaN.
    scores = jnp.where(mask_Bx1xLxT[:, :, None], scores * Dh**-0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BxKxTxD.dtype)
    out = jnp.einsum("bkglt,bktd->bkgld", weights, v_BxKxTxD)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, L, H, Dh)


def cached_attention(q_BxLxHxD, k_BxTxKxD, v_BxTxKxD, before_B):
    """Query l of sequence b sees the slots up to number `before_B[b] + l`; [B, L, H, Dh]."""
    last_BxL = before_B[:, None] + jnp.arange(q_BxLxHxD.shape[1])
    seen_BxLxT = jnp.arange(k_BxTxKxD.shape[1]) <= last_BxL[..., None]
    return einsum_attention(q_BxLxHxD, k_BxTxKxD, v_BxTxKxD, seen_BxLxT[:, None])


def chunked_attention(
    q_BxLxHxD, k_BxTxKxD, v_BxTxKxD, segments_BxL, all_segments_BxT=None, slots_L=None
):
    """The same in memory that grows with L and T alone, forward and backward.

    Queries are at `slots_L` of the T positions; without those two they are all of them.

    Each chunk's scores are computed anew for the backward pass, where the gradients of keys and
    values sum over chunks in float32.
    """
    B, L, H, Dh = q_BxLxHxD.shape
    if slots_L is None:
        all_segments_BxT, slots_L = segments_BxL, jnp.arange(L)
    dtype, missing = q_BxLxHxD.dtype, -L % _CHUNK
    k_BxTxKxD, v_BxTxKxD = (x.astype(jnp.float32) for x in (k_BxTxKxD, v_BxTxKxD))

    def pieces(x):
        x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(B, -1, _CHUNK, *x.shape[2:]).swapaxes(0, 1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_chunk(chunk):
        q_BxCxHxD, segments_BxC, slots_C = chunk
        mask_Bx1xCxT = document_mask(segments_BxC, all_segments_BxT, slots_C)
        k, v = (x.astype(dtype) for x in (k_BxTxKxD, v_BxTxKxD))
        return einsum_attention(q_BxCxHxD, k, v, mask_Bx1xCxT)

    slots_NxC = jnp.pad(slots_L, (0, missing)).reshape(-1, _CHUNK)
    out_NxBxCxHxD = jax.lax.map(one_chunk, (pieces(q_BxLxHxD), pieces(segments_BxL), slots_NxC))
    return out_NxBxCxHxD.swapaxes(0, 1).reshape(B, -1, H, Dh)[:, :L]
