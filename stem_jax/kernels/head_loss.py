"""Cross-entropy of the output head, without ever holding the logits of a whole batch.

Logits exist for `chunk` tokens of a device at a time. Their gradient is taken in the same pass,
while they are there, so the head costs three matmuls as in the plain formulation; recomputing the
logits in the backward pass would cost a fourth.

Between the matmuls the logits are passed over once. The first matmul finds their largest on its
way out; the pass turns them into exponentials, in the dtype of the hidden states, and sums those;
the other two matmuls make the gradient of the logits from the exponentials as they read them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from stem_jax.mesh import TOKEN_AXES, gather, live_axes, sum_and_scatter, token_spec
from stem_jax.parts import part

_TOKENS = token_spec()
_HEAD = PartitionSpec("fsdp", "tensor")
# Tokens whose logits exist at a time unless told otherwise. Each chunk reads and writes the whole
# gradient of the head: with 1024 of them a TPU waits for that, from 2048 on its matmuls cover it.
_TOKENS_AT_A_TIME = 2048
_MOST_BYTES = 2**30
# Rows of a bfloat16 tile on TPUs.
_TILE = 16


def tokens_at_a_time(num_tokens: int, num_columns: int) -> int:
    """A chunk of `num_tokens` tokens with float32 logits [num_columns] of at most 1 GiB."""
    return min(num_tokens, _TOKENS_AT_A_TIME, max(_MOST_BYTES // (4 * num_columns), 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def head_loss(hidden_BxLxD, head_DxV, targets_BxL, weights_BxL, z_loss, chunk, mesh):
    """Weighted cross-entropy sum(weights * (-log p(target) + z_loss * logsumexp^2)).

    Args:
        hidden_BxLxD: final hidden states, compute dtype; logits and sums are float32.
        head_DxV: output head; D over fsdp, V over tensor.
        targets_BxL: int32.
        weights_BxL: float32; 1 / (number of scored positions) makes the result a mean.
        z_loss: coefficient of the squared log partition function (PaLM, section 5); 0 is off.
        chunk: logits exist for so many positions of each sequence of a device at a time; None:
            for `tokens_at_a_time` of its tokens.
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
    gradients = (_TOKENS, _HEAD) if with_gradient else None
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(_TOKENS, _HEAD, _TOKENS, _TOKENS),
        out_specs=(scalars, gradients),
        check_vma=False,
    )(hidden, head, targets, weights)


def _local_sums(hidden_BxLxD, head_DxV, targets_BxL, weights_BxL, *, z_loss, chunk, mesh, grad):
    """One device's share: its positions of its sequences, its slice of the vocabulary."""
    B, L, D = hidden_BxLxD.shape
    full_dtype = head_DxV.dtype
    head_DxV = gather(head_DxV.astype(hidden_BxLxD.dtype), "fsdp", 0, mesh)
    num_local = head_DxV.shape[1]
    tokens = tokens_at_a_time(B * L, num_local) if chunk is None else min(chunk, L) * B
    over_vocab, over_tokens = live_axes(mesh, "tensor"), live_axes(mesh, *TOKEN_AXES)
    first = jax.lax.axis_index(over_vocab) * num_local if over_vocab else 0

    def one_chunk(hidden_CxD, targets_C, weights_C):
        if grad:
            # An array of its own, not a slice that every matmul takes anew: so it lies in fast
            # memory. Without gradients there is but one matmul, which others may share.
            hidden_CxD = jax.lax.optimization_barrier(hidden_CxD)
        logits_CxV = jnp.dot(hidden_CxD, head_DxV, preferred_element_type=jnp.float32)
        top_C = jax.lax.pmax(jnp.max(logits_CxV, axis=-1), over_vocab)
        is_target_CxV = jnp.arange(num_local) == (targets_C - first)[:, None]
        exps_CxV = jnp.exp(logits_CxV - top_C[:, None])
        total_C = jnp.sum(exps_CxV, axis=-1)
        target_logit_C = jax.lax.platform_dependent(
            logits_CxV, is_target_CxV, targets_C - first, cpu=_gathered, default=_summed
        )
        if grad:
            exps_CxV = exps_CxV.astype(hidden_CxD.dtype)
            # Or each of the matmuls would take the exponentials of float32 logits again.
            exps_CxV, total_C, target_logit_C = jax.lax.optimization_barrier(
                (exps_CxV, total_C, target_logit_C)
            )
        total_C, target_logit_C = jax.lax.psum((total_C, target_logit_C), over_vocab)
        log_z_C = jnp.log(total_C) + top_C
        cross_entropy = jnp.sum(weights_C * (log_z_C - target_logit_C))
        loss = cross_entropy + z_loss * jnp.sum(weights_C * log_z_C**2)
        if not grad:
            return (loss, cross_entropy), None
        # d loss / d logits = weight * (softmax * (1 + 2 z log Z) - onehot). That of the target is
        # made apart, in float32, and selected, which is less work than a subtraction everywhere.
        factor_C = 1 + 2 * z_loss * log_z_C
        of_target_C = weights_C * (jnp.exp(target_logit_C - log_z_C) * factor_C - 1)
        scale_C = weights_C * factor_C / total_C
        d_logits_CxV = jnp.where(
            is_target_CxV, of_target_C[:, None], exps_CxV.astype(jnp.float32) * scale_C[:, None]
        ).astype(hidden_CxD.dtype)
        d_hidden_CxD = jnp.einsum("cv,dv->cd", d_logits_CxV, head_DxV)
        hidden_DxC = jax.lax.optimization_barrier(hidden_CxD.T)
        d_head_DxV = jnp.dot(hidden_DxC, d_logits_CxV, preferred_element_type=jnp.float32)
        return (loss, cross_entropy), (jax.lax.psum(d_hidden_CxD, over_vocab), d_head_DxV)

    scalars, gradients = _over_chunks(
        one_chunk, tokens, hidden_BxLxD.reshape(-1, D), targets_BxL.ravel(), weights_BxL.ravel()
    )
    scalars = jax.lax.psum(scalars, over_tokens)
    if not grad:
        return scalars, None
    d_hidden_NxD, d_head_DxV = gradients
    d_head_DxV = sum_and_scatter(d_head_DxV, "fsdp", 0, mesh)
    return scalars, (d_hidden_NxD.reshape(B, L, D), d_head_DxV.astype(full_dtype))


def _gathered(logits_CxV, is_target_CxV, targets_C):
    """The logit of each target, 0 where it is not here."""
    column_C = jnp.clip(targets_C, 0, logits_CxV.shape[1] - 1)
    picked_C = jnp.take_along_axis(logits_CxV, column_C[:, None], axis=-1)[:, 0]
    return jnp.where(column_C == targets_C, picked_C, 0.0)


def _summed(logits_CxV, is_target_CxV, targets_C):
    """The same within a pass over all logits, where a gather takes single elements one by one."""
    return jnp.sum(jnp.where(is_target_CxV, logits_CxV, 0.0), axis=-1)


def _over_chunks(one_chunk, chunk: int, hidden_NxD, targets_N, weights_N):
    """Adds up the chunks' sums and head gradients, and strings their hidden gradients together."""
    N, D = hidden_NxD.shape
    if chunk >= N:
        return one_chunk(hidden_NxD, targets_N, weights_N)
    count = -(-N // chunk)
    # As even as can be: the last chunk would be padded to a whole one.
    chunk = min(chunk, -(-N // (count * _TILE)) * _TILE)
    pad = count * chunk - N

    def split(x):
        x = jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(count, chunk, *x.shape[1:])

    def sums_of(piece):
        scalars, gradients = one_chunk(*piece)
        d_hidden, d_head = (None, None) if gradients is None else gradients
        return (scalars, d_head), d_hidden

    def body(carry, piece):
        sums, d_hidden = sums_of(piece)
        return jax.tree.map(jnp.add, carry, sums), d_hidden

    pieces = (split(hidden_NxD), split(targets_N), split(weights_N))
    start = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(lambda p: sums_of(p)[0], [x[0] for x in pieces]),
    )
    (scalars, d_head), d_hidden = jax.lax.scan(body, start, pieces)
    if d_head is None:
        return scalars, None
    return scalars, (d_hidden.reshape(-1, D)[:N], d_head)
