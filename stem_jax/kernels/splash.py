"""JAX's splash attention for TPUs, its results as the layers and the way back read them.

JAX's kernel gives the output as [H, L, Dh] and the logsumexp of each position 128 times, as
[H, L, 128]: for one of those the compiler turns all of them, and for the sums of output times
gradient it reads both padded to 128 lanes. Of a layer of 8 x 4096 positions, 32 heads of 64, that
takes a v5e 7 M cycles, as much as all else between projections and kernel. Here the same kernel
leaves both results on the chip, from where they are written turned, and the sums are made where the
gradient is turned.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masks:
    """Which blocks of queries see which blocks of keys, for the forward pass and both ways back.

    In all arrays queries lie along the last dimension but one, or the only one. block: positions.
    """

    forward: MaskInfo
    of_queries: MaskInfo
    of_keys: MaskInfo
    block: int = dataclasses.field(metadata={"static": True})


class _Queries(splash_attention_mask.Mask):
    """Queries at `q_sequence` of T positions see the keys up to their own."""

    def __init__(self, slots_L: np.ndarray):
        self.q_sequence = slots_L
        self.mask_function = _up_to

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.q_sequence), len(self.q_sequence)

    def __getitem__(self, place: tuple[slice, slice]) -> np.ndarray:
        queries, keys = place
        return _up_to(self.q_sequence[queries, None], np.arange(keys.start, keys.stop)[None])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Queries) and np.array_equal(self.q_sequence, other.q_sequence)

    def __hash__(self) -> int:
        return hash(self.q_sequence.tobytes())


def _up_to(queries, keys):
    return queries >= keys


def causal_masks(slots_T: np.ndarray, devices: int, head_dim: int) -> Masks:
    """The masks of all devices of a sequence, those of each one after the other.

    Args:
        slots_T: positions of the queries in the sequence, those of each device after the other's;
            keys lie in their order.
        devices: that have as many queries each, a multiple of 128.
    """
    length = len(slots_T)
    own = length // devices
    # A device has two chunks of neighbours.
    whole = own // 2 if devices > 1 and own // 2 % BLOCK == 0 else own
    sizes = block_sizes(length, head_dim, whole)
    mask = splash_attention_mask.MultiHeadMask([_Queries(slots_T)])
    made = library.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=devices)
    infos: list[Any] = [
        MaskInfo(info.data_next, None, info.block_mask, None, info.q_sequence)
        for info in (made.fwd_mask_info, made.dq_mask_info, made.dkv_mask_info)
    ]
    forward, by_query, by_key = infos
    return Masks(forward, by_query, by_key, block=sizes.block_q)


def block_sizes(length: int, head_dim: int, divided: int | None = None) -> library.BlockSizes:
    """Blocks of all kernels: 512 if the length allows; 1024 where it has eight of those.

    Args:
        divided: what they are to divide; None: the length.
    """
    most = 1024 if length >= 8192 and head_dim <= 128 else 512
    divided = length if divided is None else divided
    block = next(size for size in _BLOCKS if size <= most and divided % size == 0)
    layouts: dict[str, Any] = dict.fromkeys(("q_layout", "k_layout", "v_layout"), _LAYOUT)
    backward = ("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    of_backward: dict[str, Any] = dict.fromkeys(backward, block)
    return library.BlockSizes(block, block, **of_backward, **layouts)


def splash(
    q_BxHxLxD,
    k_BxKxTxD,
    v_BxKxTxD,
    segments_BxL,
    interpret: bool,
    all_segments_BxT=None,
    masks: Masks | None = None,
) -> jax.Array:
    """Causal attention within segments as [B, H, Dh, L].

    Args:
        q_BxHxLxD: scaled queries, which like keys and values lie as [B, H, Dh, L]; L a multiple of
            128, and head h reads the keys of head h // (H / K).
        segments_BxL: int32; positions see those with the same number.
        interpret: without a TPU.
        all_segments_BxT: of the keys, and
        masks: the part of `causal_masks` of these queries. None: queries and keys are of the same
            positions, in their order.
    """
    if masks is None:
        L, Dh = q_BxHxLxD.shape[2:]
        all_segments_BxT, masks = segments_BxL, causal_masks(np.arange(L, dtype=np.int32), 1, Dh)
    segments = segments_BxL, all_segments_BxT
    return _splash(masks, q_BxHxLxD, k_BxKxTxD, v_BxKxTxD, segments, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _splash(masks, q, k, v, segments, interpret):
    return _forward(masks, q, k, v, segments, interpret)[0]


@part("attention")
def _forward(masks, q, k, v, segments, interpret):
    attend = functools.partial(_attend, masks.forward, block=masks.block, interpret=interpret)
    # With both kept, the way back does not need this kernel once more.
    out_BxHxDxL, log_sums_BxHxL = map(kept_names.attention, jax.vmap(attend)(q, k, v, *segments))
    return out_BxHxDxL, (masks, q, k, v, segments, out_BxHxDxL, log_sums_BxHxL)


def _backward(interpret, kept, gradient_BxHxDxL):
    masks, q, k, v, segments, out_BxHxDxL, log_sums_BxHxL = kept
    gradient_BxHxLxD, sums_BxHxL = gradient_to_heads(gradient_BxHxDxL, out_BxHxDxL, interpret)
    block = masks.block
    same = {
        "is_mqa": False,
        "mask_value": _MASK_VALUE,
        "attn_logits_soft_cap": None,
        "q_layout": _LAYOUT,
        "k_layout": _LAYOUT,
        "v_layout": _LAYOUT,
        "mask_function": _up_to,
        "interpret": interpret,
        "bq": block,
        "bkv": block,
    }

    def one_sequence(q, k, v, segments, *rest):
        arguments = q, k, v, library.SegmentIds(*segments), None, *rest
        _, dk, dv = library._splash_attention_bwd_dkv(
            *arguments,
            bkv_compute=block,
            mask_info=masks.of_keys,
            use_fused_bwd_kernel=False,
            **same,
        )
        dq = library._splash_attention_bwd_dq(*arguments, mask_info=masks.of_queries, **same)
        return dq, dk, dv

    with part("attention"):
        gradients = jax.vmap(one_sequence)(
            q, k, v, segments, log_sums_BxHxL, gradient_BxHxLxD, sums_BxHxL
        )
    return None, *gradients, None


_splash.defvjp(_forward, _backward)


def _attend(
    mask: MaskInfo, q_HxLxD, k_KxTxD, v_KxTxD, segments_L, all_segments_T, *, block, interpret
):
    """Output [H, Dh, L] and logsumexp [H, L] of a sequence."""
    H, L, Dh = q_HxLxD.shape
    assert mask.data_next is not None and mask.q_sequence is not None
    of_kv_head, steps = H // len(k_KxTxD), mask.data_next.shape[-1]

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
    call = pl.pallas_call(
        functools.partial(_body, steps=steps, block=block, head_dim=Dh),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(H, L // block, steps),
            in_specs=[
                heads,
                kv_heads,
                kv_heads,
                rows,
                pl.BlockSpec((_SUBLANES, block), kv_segments_place),
                rows,
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
            turned(k_KxTxD),
            turned(v_KxTxD),
            lanes(segments_L, (L, _LANES)),
            jnp.broadcast_to(all_segments_T, (_SUBLANES, len(all_segments_T))),
            lanes(mask.q_sequence, (L, _LANES)),
        )
    return out_HxDxL, log_sums_Hx1xL[:, 0]


def _body(*refs, steps: int, block: int, head_dim: int):
    *inputs, q_sequence_ref, out_ref, log_sum_ref = refs[:11]
    out_LxD, log_sum_Lx128 = refs[-2:]
    # Neither sinks nor blocks of a mask.
    places: list[Any] = [*inputs, None, None, q_sequence_ref, *refs[11:]]
    kernel: Any = library.flash_attention_kernel
    kernel(
        *places,
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
        mask_function=_up_to,
    )

    @pl.when(pl.program_id(2) == steps - 1)
    def _():
        out_ref[...] = out_LxD[...].T
        log_sum_ref[...] = log_sum_Lx128[...].T[:1]
