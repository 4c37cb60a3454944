"""JAX's splash attention for TPUs, its results as the layers and the way back read them.

JAX's kernel gives the output as [H, L, Dh] and the logsumexp of each position 128 times, as
[H, L, 128]: for one of those the compiler turns all of them, and for the sums of output times
gradient it reads both padded to 128 lanes. Of a layer of 8 x 4096 positions, 32 heads of 64, that
takes a v5e 7 M cycles, as much as all else between projections and kernel. Here the same kernel
leaves both results on the chip, from where they are written turned, and the sums are made where the
gradient is turned.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

from stem_jax.kernels import kept_names
from stem_jax.kernels.heads import gradient_to_heads
from stem_jax.parts import part

# What lengths are multiples of.
BLOCK = 128
# Positions that the kernels take at a time. A step of their grids costs some 0.35 us whatever it
# does (JAX's documentation of Pallas), and 128 x 128 pairs of positions do not fill that. Larger
# blocks compute more pairs in vain along the diagonal; 1024 of large heads do not fit the chip.
_BLOCKS = (1024, 512, 256, 128)
_LANES, _SUBLANES = 128, 8
# Queries, keys and values lie as `kernels.heads` leaves them.
_LAYOUT = library.QKVLayout.SEQ_MINOR
_MASK_VALUE = library.DEFAULT_MASK_VALUE


def block_sizes(length: int, head_dim: int) -> library.BlockSizes:
    """Blocks of all kernels: 512 if the length allows; 1024 where it has eight of those."""
    most = 1024 if length >= 8192 and head_dim <= 128 else 512
    block = next(size for size in _BLOCKS if size <= most and length % size == 0)
    layouts = dict.fromkeys(("q_layout", "k_layout", "v_layout"), _LAYOUT)
    of_backward = dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), block)
    return library.BlockSizes(block, block, **of_backward, **layouts)


def splash(q_BxHxLxD, k_BxKxLxD, v_BxKxLxD, segments_BxL, interpret: bool) -> jax.Array:
    """Causal attention within segments as [B, H, Dh, L].

    Args:
        q_BxHxLxD: scaled queries, which like keys and values lie as [B, H, Dh, L]; L a multiple of
            128, and head h reads the keys of head h // (H / K).
        segments_BxL: int32; positions see those with the same number.
        interpret: without a TPU.
    """
    _, H, L, Dh = q_BxHxLxD.shape
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((L, L))] * H)
    made = library.make_splash_mha(
        mask, block_sizes=block_sizes(L, Dh), head_shards=1, q_seq_shards=1
    )
    masks = made.fwd_mask_info, made.dq_mask_info, made.dkv_mask_info
    function = made.kwargs["mask_function"]
    return _splash(masks, q_BxHxLxD, k_BxKxLxD, v_BxKxLxD, segments_BxL, function, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _splash(masks, q, k, v, segments, mask_function, interpret):
    return _forward(masks, q, k, v, segments, mask_function, interpret)[0]


@part("attention")
def _forward(masks, q, k, v, segments, mask_function, interpret):
    attend = functools.partial(_attend, masks[0], mask_function=mask_function, interpret=interpret)
    # With both kept, the way back does not need this kernel once more.
    out_BxHxDxL, log_sums_BxHxL = map(kept_names.attention, jax.vmap(attend)(q, k, v, segments))
    return out_BxHxDxL, (masks, q, k, v, segments, out_BxHxDxL, log_sums_BxHxL)


def _backward(mask_function, interpret, kept, gradient_BxHxDxL):
    masks, q, k, v, segments, out_BxHxDxL, log_sums_BxHxL = kept
    gradient_BxHxLxD, sums_BxHxL = gradient_to_heads(gradient_BxHxDxL, out_BxHxDxL, interpret)
    block = block_sizes(*q.shape[2:]).block_q
    same = {
        "is_mqa": False,
        "mask_value": _MASK_VALUE,
        "attn_logits_soft_cap": None,
        "q_layout": _LAYOUT,
        "k_layout": _LAYOUT,
        "v_layout": _LAYOUT,
        "mask_function": mask_function,
        "interpret": interpret,
        "bq": block,
        "bkv": block,
    }

    def one_sequence(q, k, v, segments, *rest):
        arguments = q, k, v, library.SegmentIds(segments, segments), None, *rest
        _, dk, dv = library._splash_attention_bwd_dkv(
            *arguments, bkv_compute=block, mask_info=masks[2], use_fused_bwd_kernel=False, **same
        )
        dq = library._splash_attention_bwd_dq(*arguments, mask_info=masks[1], **same)
        return dq, dk, dv

    with part("attention"):
        gradients = jax.vmap(one_sequence)(
            q, k, v, segments, log_sums_BxHxL, gradient_BxHxLxD, sums_BxHxL
        )
    return None, *gradients, None


_splash.defvjp(_forward, _backward)


def _attend(mask, q_HxLxD, k_KxLxD, v_KxLxD, segments_L, *, mask_function, interpret):
    """Output [H, Dh, L] and logsumexp [H, L] of a sequence."""
    H, L, Dh = q_HxLxD.shape
    of_kv_head, block = H // len(k_KxLxD), block_sizes(L, Dh).block_q
    steps = L // block if mask.data_next is None else mask.data_next.shape[-1]

    def kv_place(h, i, j, *prefetched):
        place, *_ = library._next_nonzero(h, i, j, *prefetched)
        return h // of_kv_head, 0, place

    def kv_segments_place(h, i, j, *prefetched):
        place, *_ = library._next_nonzero(h, i, j, *prefetched)
        return 0, place

    rows = pl.BlockSpec((block, _LANES), lambda h, i, *_: (i, 0))
    heads = pl.BlockSpec((None, Dh, block), lambda h, i, *_: (h, 0, i))
    kv_heads = pl.BlockSpec((None, Dh, block), kv_place)
    turned = functools.partial(jnp.swapaxes, axis1=-1, axis2=-2)
    lanes = functools.partial(jax.lax.broadcast_in_dim, broadcast_dimensions=(0,))
    computed = mask.q_sequence is not None
    call = pl.pallas_call(
        functools.partial(
            _body, steps=steps, block=block, head_dim=Dh, mask_function=mask_function
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(H, L // block, steps),
            in_specs=[
                heads,
                kv_heads,
                kv_heads,
                rows,
                pl.BlockSpec((_SUBLANES, block), kv_segments_place),
                rows if computed else None,
            ],
            out_specs=[heads, pl.BlockSpec((None, 1, block), lambda h, i, *_: (h, 0, i))],
            scratch_shapes=[
                *[pltpu.VMEM((block, _LANES), jnp.float32)] * 2,
                pltpu.VMEM((block, Dh), jnp.float32),
                pltpu.VMEM((block, Dh), q_HxLxD.dtype),
                pltpu.VMEM((block, _LANES), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((H, Dh, L), q_HxLxD.dtype),
            jax.ShapeDtypeStruct((H, 1, L), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name="splash_forward",
    )
    # Under vmap the outermost scope is renamed; the innermost is what programs call the kernel.
    with jax.named_scope("splash_forward"):
        out_HxDxL, log_sums_Hx1xL = call(
            mask.data_next,
            mask.block_mask,
            mask.mask_next,
            turned(q_HxLxD),
            turned(k_KxLxD),
            turned(v_KxLxD),
            lanes(segments_L, (L, _LANES)),
            jnp.broadcast_to(segments_L, (_SUBLANES, L)),
            lanes(mask.q_sequence, (L, _LANES)) if computed else None,
        )
    return out_HxDxL, log_sums_Hx1xL[:, 0]


def _body(*refs, steps: int, block: int, head_dim: int, mask_function):
    *inputs, q_sequence_ref, out_ref, log_sum_ref = refs[:11]
    out_LxD, log_sum_Lx128 = refs[-2:]
    library.flash_attention_kernel(
        *inputs,
        # Neither sinks nor blocks of a mask.
        None,
        None,
        q_sequence_ref,
        *refs[11:],
        mask_value=_MASK_VALUE,
        grid_width=steps,
        bq=block,
        bkv=block,
        bkv_compute=block,
        head_dim_v=head_dim,
        q_layout=_LAYOUT,
        k_layout=_LAYOUT,
        v_layout=_LAYOUT,
        attn_logits_soft_cap=None,
        mask_function=mask_function,
    )

    @pl.when(pl.program_id(2) == steps - 1)
    def _():
        out_ref[...] = out_LxD[...].T
        log_sum_ref[...] = log_sum_Lx128[...].T[:1]
