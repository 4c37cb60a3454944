"""Causal attention within documents as plain products, whole or in chunks of queries."""

import functools

import jax
import jax.numpy as jnp

# Queries of a chunk: float32 scores [B, H, 32, L] are the largest array that there is then. Of 64
# they and their gradients took more than all pairs in bfloat16, as cuDNN wants them.
_CHUNK = 32


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
    heads_first = (x.transpose(0, 2, 1, 3) for x in (k_BxTxKxD, v_BxTxKxD))
    return _attention(q_BxLxHxD, *heads_first, mask_Bx1xLxT)


def _attention(q_BxLxHxD, k_BxKxTxD, v_BxKxTxD, mask_Bx1xLxT):
    B, L, H, Dh = q_BxLxHxD.shape
    K = k_BxKxTxD.shape[1]
    q_BxKxGxLxD = q_BxLxHxD.reshape(B, L, K, H // K, Dh).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum(
        "bkgld,bktd->bkglt", q_BxKxGxLxD, k_BxKxTxD, preferred_element_type=jnp.float32
    )
    # Finite, so that a row without any visible slot gives a mean and not NaN.
    scores = jnp.where(mask_Bx1xLxT[:, :, None], scores * Dh**-0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BxKxTxD.dtype)
    out = jnp.einsum("bkglt,bktd->bkgld", weights, v_BxKxTxD)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, L, H, Dh)


def cached_attention(q_BxLxHxD, k_BxKxTxD, v_BxKxTxD, before_B):
    """Query l of sequence b sees the slots up to number `before_B[b] + l`; [B, L, H, Dh]."""
    last_BxL = before_B[:, None] + jnp.arange(q_BxLxHxD.shape[1])
    seen_BxLxT = jnp.arange(k_BxKxTxD.shape[2]) <= last_BxL[..., None]
    return _attention(q_BxLxHxD, k_BxKxTxD, v_BxKxTxD, seen_BxLxT[:, None])


def chunked_attention(
    q_BxLxHxD, k_BxTxKxD, v_BxTxKxD, segments_BxL, all_segments_BxT=None, slots_L=None
):
    """The same in memory that grows with L and T alone, forward and backward.

    Queries are at `slots_L` of the T positions; without those two they are all of them.

    Each chunk's scores are computed anew for the backward pass, where the gradients of keys and
    values sum over chunks in float32.
    """
    L, missing = q_BxLxHxD.shape[1], -q_BxLxHxD.shape[1] % _CHUNK
    if slots_L is None:
        all_segments_BxT, slots_L = segments_BxL, jnp.arange(L)
    if missing:
        q_BxLxHxD, segments_BxL = (
            jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))
            for x in (q_BxLxHxD, segments_BxL)
        )
        slots_L = jnp.pad(slots_L, (0, missing))
    segments = segments_BxL, all_segments_BxT
    return _in_chunks(q_BxLxHxD, k_BxTxKxD, v_BxTxKxD, *segments, slots_L)[:, :L]


# Chunks are cut out of the arrays, and put into them, where these lie: a scan would want, and give,
# copies in another order, and its gradient float32 copies of keys and values.
@jax.custom_vjp
def _in_chunks(q_BxLxHxD, k_BxTxKxD, v_BxTxKxD, *places):
    def one_chunk(number, out_BxLxHxD):
        q_BxCxHxD, attend = _chunk(number, q_BxLxHxD, *places)
        return _put(out_BxLxHxD, attend(q_BxCxHxD, k_BxTxKxD, v_BxTxKxD), number)

    chunks = q_BxLxHxD.shape[1] // _CHUNK
    return jax.lax.fori_loop(0, chunks, one_chunk, jnp.zeros_like(q_BxLxHxD))


def _forward(*inputs):
    return _in_chunks(*inputs), inputs


def _backward(inputs, gradient_BxLxHxD):
    q_BxLxHxD, k_BxTxKxD, v_BxTxKxD, *places = inputs
    chunks = q_BxLxHxD.shape[1] // _CHUNK

    def one_chunk(turn, carry):
        dq_BxLxHxD, *sums = carry
        # From the last to the first: bits of the sums depend on it.
        number = chunks - 1 - turn
        q_BxCxHxD, attend = _chunk(number, q_BxLxHxD, *places)
        _, pull = jax.vjp(attend, q_BxCxHxD, k_BxTxKxD, v_BxTxKxD)
        dq_BxCxHxD, *fresh = pull(_cut(gradient_BxLxHxD, number, axis=1))
        sums = (total + x.astype(jnp.float32) for total, x in zip(sums, fresh, strict=True))
        return _put(dq_BxLxHxD, dq_BxCxHxD, number), *sums

    sums = (jnp.zeros(x.shape, jnp.float32) for x in (k_BxTxKxD, v_BxTxKxD))
    start = (jnp.zeros_like(q_BxLxHxD), *sums)
    dq_BxLxHxD, *sums = jax.lax.fori_loop(0, chunks, one_chunk, start)
    return dq_BxLxHxD, *(x.astype(k_BxTxKxD.dtype) for x in sums), *(None,) * len(places)


_in_chunks.defvjp(_forward, _backward)


def _chunk(number, q_BxLxHxD, segments_BxL, all_segments_BxT, slots_L):
    """The queries of a chunk, and the attention of queries that stand there."""
    places = _cut(segments_BxL, number, axis=1), all_segments_BxT, _cut(slots_L, number, axis=0)
    attend = functools.partial(einsum_attention, mask_Bx1xLxT=document_mask(*places))
    return _cut(q_BxLxHxD, number, axis=1), attend


def _cut(x, number, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, number * _CHUNK, _CHUNK, axis)


def _put(x_BxLx, chunk_BxCx, number) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x_BxLx, chunk_BxCx, number * _CHUNK, axis=1)
