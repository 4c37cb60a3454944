"""Cross-entropy of the output head, without ever holding the logits of a whole batch.

Logits exist for `chunk` positions of each sequence at a time. Their gradient is taken in the same
pass, while they are there, so the head costs three matmuls as in the plain formulation; recomputing
the logits in the backward pass would cost a fourth.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from stem_jax.mesh import BATCH_AXES, gather, live_axes, sum_and_scatter
from stem_jax.parts import part

_HIDDEN = PartitionSpec(BATCH_AXES, None, None)
_TOKENS = PartitionSpec(BATCH_AXES, None)
_HEAD = PartitionSpec("fsdp", "tensor")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def head_loss(hidden_BxLxD, head_DxV, targets_BxL, weights_BxL, z_loss, chunk, mesh):
    """Weighted cross-entropy sum(weights * (-log p(target) + z_loss * logsumexp^2)).

    Args:
        hidden_BxLxD: final hidden states, compute dtype; logits and sums are float32.
        head_DxV: output head; D over fsdp, V over tensor.
        targets_BxL: int32.
        weights_BxL: float32; 1 / (number of scored positions) makes the result a mean.
        z_loss: coefficient of the squared log partition function (PaLM, section 5); 0 is off.
        chunk: positions of each sequence whose logits exist at a time.
        mesh: None for a single device.

    Returns:
        Two float32 scalars over all devices: the loss, and its cross-entropy part.
    """
    return _sums(hidden_BxLxD, head_DxV, targets_BxL, weights_BxL, z_loss, chunk, mesh, False)[0]


def _forward(hidden_BxLxD, head_DxV, targets_BxL, weights_BxL, z_loss, chunk, mesh):
    return _sums(hidden_BxLxD, head_DxV, targets_BxL, weights_BxL, z_loss, chunk, mesh, True)


@part("head_loss")
def _backward(z_loss, chunk, mesh, gradients, cotangents):
    # Only the loss is trained on; the cross-entropy part is reported.
    hidden_gradient, head_gradient = gradients
    factor = cotangents[0]
    return (
        (hidden_gradient * factor).astype(hidden_gradient.dtype),
        (head_gradient * factor).astype(head_gradient.dtype),
        None,
        None,
    )


head_loss.defvjp(_forward, _backward)


@part("head_loss")
def _sums(hidden, head, targets, weights, z_loss, chunk, mesh, with_gradient):
    local = functools.partial(
        _local_sums, z_loss=z_loss, chunk=chunk, mesh=mesh, grad=with_gradient
    )
    if mesh is None:
        return local(hidden, head, targets, weights)
    scalars = (PartitionSpec(), PartitionSpec())
    gradients = (_HIDDEN, _HEAD) if with_gradient else None
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(_HIDDEN, _HEAD, _TOKENS, _TOKENS),
        out_specs=(scalars, gradients),
        check_vma=False,
    )(hidden, head, targets, weights)


def _local_sums(hidden_BxLxD, head_DxV, targets_BxL, weights_BxL, *, z_loss, chunk, mesh, grad):
    """One device's share: all positions of its sequences, its slice of the vocabulary."""
    full_dtype = head_DxV.dtype
    head_DxV = gather(head_DxV.astype(hidden_BxLxD.dtype), "fsdp", 0, mesh)
    num_local = head_DxV.shape[1]
    over_vocab, over_batch = live_axes(mesh, "tensor"), live_axes(mesh, *BATCH_AXES)
    first = jax.lax.axis_index(over_vocab) * num_local if over_vocab else 0

    def one_chunk(hidden_BxCxD, targets_BxC, weights_BxC):
        logits = jnp.einsum(
            "bcd,dv->bcv", hidden_BxCxD, head_DxV, preferred_element_type=jnp.float32
        )
        top_BxC = jax.lax.pmax(jnp.max(logits, axis=-1), over_vocab)
        exps = jnp.exp(logits - top_BxC[..., None])
        total_BxC = jax.lax.psum(jnp.sum(exps, axis=-1), over_vocab)
        log_z_BxC = jnp.log(total_BxC) + top_BxC
        local_targets = targets_BxC - first
        inside = (local_targets >= 0) & (local_targets < num_local)
        column = jnp.clip(local_targets, 0, num_local - 1)
        picked = jnp.take_along_axis(logits, column[..., None], axis=-1)[..., 0]
        target_logit_BxC = jax.lax.psum(jnp.where(inside, picked, 0.0), over_vocab)
        cross_entropy = jnp.sum(weights_BxC * (log_z_BxC - target_logit_BxC))
        loss = cross_entropy + z_loss * jnp.sum(weights_BxC * log_z_BxC**2)
        if not grad:
            return (loss, cross_entropy), None
        # d loss / d logits = weight * (softmax * (1 + 2 z log Z) - onehot)
        scale_BxC = weights_BxC * (1 + 2 * z_loss * log_z_BxC) / total_BxC
        onehot = jnp.arange(num_local) == jnp.where(inside, column, -1)[..., None]
        d_logits = exps * scale_BxC[..., None] - jnp.where(onehot, weights_BxC[..., None], 0.0)
        d_logits = d_logits.astype(hidden_BxCxD.dtype)
        d_hidden = jax.lax.psum(jnp.einsum("bcv,dv->bcd", d_logits, head_DxV), over_vocab)
        d_head = jnp.einsum(
            "bcd,bcv->dv", hidden_BxCxD, d_logits, preferred_element_type=jnp.float32
        )
        return (loss, cross_entropy), (d_hidden, d_head)

    scalars, gradients = _over_chunks(one_chunk, chunk, hidden_BxLxD, targets_BxL, weights_BxL)
    scalars = jax.lax.psum(scalars, over_batch)
    if not grad:
        return scalars, None
    d_hidden, d_head = gradients
    d_head = sum_and_scatter(d_head, "data", "fsdp", 0, mesh)
    return scalars, (d_hidden, d_head.astype(full_dtype))


def _over_chunks(one_chunk, chunk: int, hidden_BxLxD, targets_BxL, weights_BxL):
    """Adds up the chunks' sums and head gradients, and strings their hidden gradients together."""
    B, L, D = hidden_BxLxD.shape
    if chunk >= L:
        return one_chunk(hidden_BxLxD, targets_BxL, weights_BxL)
    pad = -L % chunk

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(B, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    def body(carry, piece):
        scalars, gradients = one_chunk(*piece)
        d_hidden, d_head = (None, None) if gradients is None else gradients
        return jax.tree.map(jnp.add, carry, (scalars, d_head)), d_hidden

    pieces = (split(hidden_BxLxD), split(targets_BxL), split(weights_BxL))
    start = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(lambda p: body_shapes(one_chunk, p), [x[0] for x in pieces]),
    )
    (scalars, d_head), d_hidden = jax.lax.scan(body, start, pieces)
    if d_head is None:
        return scalars, None
    d_hidden = d_hidden.swapaxes(0, 1).reshape(B, L + pad, D)[:, :L]
    return scalars, (d_hidden, d_head)


def body_shapes(one_chunk, piece):
    """The part of a chunk's result that is summed over chunks."""
    scalars, gradients = one_chunk(*piece)
    return scalars, None if gradients is None else gradients[1]
