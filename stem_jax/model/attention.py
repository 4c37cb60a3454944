"""Causal grouped-query attention within documents, with the kernel each platform has for it."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from stem_jax.config import ModelConfig
from stem_jax.context_order import in_sequence_order
from stem_jax.context_order import slots as context_slots
from stem_jax.errors import InputError
from stem_jax.kernels import document_attention, kept_names
from stem_jax.kernels.heads import to_heads
from stem_jax.kernels.splash import BLOCK, causal_masks, splash
from stem_jax.mesh import BATCH_AXES, CONTEXT, gather, token_spec
from stem_jax.model.cache import NewCache
from stem_jax.model.einsum_attention import (
    cached_attention,
    chunked_attention,
    document_mask,
    einsum_attention,
)
from stem_jax.model.layers import Linear
from stem_jax.model.rotary import rotate
from stem_jax.parts import part


class Attention(nnx.Module):
    """Multi-head attention with rotary positions and num_heads / num_kv_heads queries per KV head.

    Position i sees position j when j <= i and both carry the same segment id.
    """

    def __init__(self, config: ModelConfig, factor: float, mesh: Mesh | None, *, rngs: nnx.Rngs):
        D, H, K, Dh = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        std = config.init_base_std or D**-0.5
        make = functools.partial(
            Linear, cut=3 * std, rngs=rngs, float8=config.matmul_dtype == "float8"
        )
        self.q_proj = make((D, H * Dh), ("embed", "heads"), std)
        kv_axes = ("embed", kv_heads_axis(K, mesh))
        self.k_proj = make((D, K * Dh), kv_axes, std)
        self.v_proj = make((D, K * Dh), kv_axes, std)
        # The published initialisation divides the std by the factor but not the cut.
        self.o_proj = make((H * Dh, D), ("heads", "embed"), std / factor)
        resolve_backend(config, mesh)
        self.head_dim = Dh
        self.config = config
        self.mesh = mesh

    @part("rotary")
    def __call__(self, x_BxLxD, angles, segment_ids_BxL, cache=None, more_BxLxKxD=None):
        """Attends within x, or, with `cache`, within what the cache holds and x.

        Args:
            x_BxLxD: normalised residual stream.
            angles: cosines and sines of `rotary.rotary_angles`.
            segment_ids_BxL: document number of each position; 0 is padding.
            cache: None, or what to read from and extend: a `cache.NewCache`, with which the
                positions attend within x as in training, or a `cache.LayerCache`. Of x it gets the
                positions up to the padding.
            more_BxLxKxD: None, or what is added to the values.

        Returns:
            The [B, L, D] output and the extended cache (None without one).
        """
        B, L, _ = x_BxLxD.shape
        inside = cache is None or isinstance(cache, NewCache)
        backend = resolve_backend(self.config, self.mesh, L) if inside else None
        if cache is None and backend == "splash":
            return self._with_splash(x_BxLxD, angles, segment_ids_BxL, more_BxLxKxD), None
        q = rotate(self.q_proj(x_BxLxD).reshape(B, L, -1, self.head_dim), angles)
        k = rotate(self.k_proj(x_BxLxD).reshape(B, L, -1, self.head_dim), angles)
        v = self.v_proj(x_BxLxD).reshape(B, L, -1, self.head_dim)
        v = v if more_BxLxKxD is None else v + more_BxLxKxD
        before = cache
        if cache is not None:
            cache = cache.extend(k, v, jnp.sum(segment_ids_BxL != 0, axis=1, dtype=jnp.int32))
        if inside:
            out = kept_names.attention(attend(q, k, v, segment_ids_BxL, backend, self.mesh))
        else:
            out = cached_attention(q, *cache.seen, before.lengths)
        return self.o_proj(out.reshape(B, L, -1)), cache

    def _with_splash(self, x_BxLxD, angles, segment_ids_BxL, more_BxLxKxD):
        """The same from projections that lie as its kernel reads them."""
        B, L, _ = x_BxLxD.shape
        q, k, v = (
            project.positions_last(x_BxLxD).reshape(B, -1, self.head_dim, L)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        v = v if more_BxLxKxD is None else v + more_BxLxKxD.transpose(0, 2, 3, 1)
        angles = tuple(a.swapaxes(1, 2) for a in angles)
        out_BxHxDxL = _splash(q, k, v, angles, segment_ids_BxL, self.mesh)
        return self.o_proj.of_positions_last(out_BxHxDxL.reshape(B, -1, L))


# By platform, the fastest first; chunked takes whatever the others do not.
_KERNELS = {"tpu": ("splash", "chunked"), "gpu": ("tokamax", "chunked")}
_OF_GPUS = ("tokamax", "cudnn")
# Where those run that do not run everywhere. CPUs interpret that of TPUs, for tests.
_PLATFORMS = {"splash": ("tpu", "cpu"), **dict.fromkeys(_OF_GPUS, ("gpu",))}


def resolve_backend(config: ModelConfig, mesh: Mesh | None, length: int = 0) -> str:
    """The attention kernel for this platform: the configured one, or by `auto` the fastest.

    Args:
        length: of the sequences that it is to take; 0: not known yet.

    Raises:
        InputError: a kernel that does not take this platform, dtype, head size or length.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    if config.attention == "auto":
        kernels = _KERNELS.get(device.platform, ("xla",))
        return next(name for name in kernels if not refusal(name, config, mesh, length))
    homes = _PLATFORMS.get(config.attention, (device.platform,))
    if device.platform not in homes:
        raise InputError(
            f"model.attention={config.attention} needs a {homes[0].upper()}, this is "
            f"{device.platform}; use auto"
        )
    if reason := refusal(config.attention, config, mesh, length):
        raise InputError(f"model.attention={config.attention} {reason}; change it, or use auto")
    return config.attention


def refusal(kernel: str, config: ModelConfig, mesh: Mesh | None, length: int) -> str | None:
    """Why a kernel of the mesh's platform does not take this model; None if it does."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    devices = _context_devices(mesh)
    over = f" over mesh.context={devices}" if devices > 1 else ""
    if kernel == "splash" and length % (BLOCK * devices):
        return (
            f"takes no sequences of {length} tokens (train.seq_len){over}, only multiples of "
            f"{BLOCK * devices}"
        )
    if kernel == "cudnn" and devices > 1:
        return f"takes no mesh.context={devices}, only 1: its queries begin where its keys do"
    if kernel not in _OF_GPUS:
        return None
    if config.compute_dtype != "bfloat16":
        return f"takes no model.compute_dtype={config.compute_dtype}, only bfloat16"
    if config.head_dim > 256 or config.head_dim % 8:
        return f"takes no model.head_dim={config.head_dim}, only multiples of 8 up to 256"
    multiple = 2 if kernel == "cudnn" else document_attention.BLOCK * devices
    if length % multiple:
        return (
            f"takes no sequences of {length} tokens (train.seq_len){over}, only multiples of "
            f"{multiple}"
        )
    return document_attention.missing(device) if kernel == "tokamax" else None


def check_heads(config: ModelConfig, mesh: Mesh) -> None:
    """Raises InputError for heads that would be cut: xla would reshard them, the others refuse."""
    H, K, tensor = config.num_heads, config.num_kv_heads, mesh.shape["tensor"]
    if H % tensor:
        raise InputError(
            f"model.num_heads={H} does not divide over mesh.tensor={tensor}: each device computes "
            "whole heads; change one of them"
        )
    if K % tensor and tensor % K:
        raise InputError(
            f"model.num_kv_heads={K} neither divides over mesh.tensor={tensor} nor divides it, so "
            "some device would need parts of several; change one of them"
        )


def kv_heads_axis(num_kv_heads: int, mesh: Mesh | None) -> str:
    """The logical axis of KV heads: each device has whole ones, or all where they are too few."""
    return "shared_kv_heads" if _devices_of_head(num_kv_heads, mesh) > 1 else "kv_heads"


def _devices_of_head(num_kv_heads: int, mesh: Mesh | None) -> int:
    """Devices along `tensor` that share each KV head; 1 where there are heads enough."""
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    return tensor // num_kv_heads if tensor % num_kv_heads == 0 else 1


def attend(q_BxLxHxD, k_BxLxKxD, v_BxLxKxD, segment_ids_BxL, backend: str, mesh: Mesh | None):
    """Causal attention within segments, [B, L, H, Dh], by the named backend.

    cudnn knows no segments: for rows of one, up to padding at the end (`run_checks` sees to it).
    """
    if backend == "splash":
        q, k, v = (x.transpose(0, 2, 3, 1) for x in (q_BxLxHxD, k_BxLxKxD, v_BxLxKxD))
        return _splash(q, k, v, None, segment_ids_BxL, mesh).transpose(0, 3, 1, 2)
    k_BxLxKxD, v_BxLxKxD = (_for_each_device(x, 2, mesh) for x in (k_BxLxKxD, v_BxLxKxD))
    arguments = q_BxLxHxD, k_BxLxKxD, v_BxLxKxD
    L, devices = q_BxLxHxD.shape[1], _context_devices(mesh)
    with part("attention"):
        if backend == "tokamax" or devices > 1:
            slots_L = jnp.asarray(context_slots(L, devices)) if devices > 1 else None
            local = functools.partial(_attend_from_own, backend, mesh)
            specs = (*(token_spec("tensor"),) * 3, token_spec(), PartitionSpec(CONTEXT))
            return _on_devices(local, mesh, specs, *arguments, segment_ids_BxL, slots_L)
        if backend == "chunked":
            return chunked_attention(*arguments, segment_ids_BxL)
        if backend == "cudnn":
            # With documents it would want a mask of all pairs. Padding ends a row, where no other
            # position sees it.
            return jax.nn.dot_product_attention(*arguments, is_causal=True, implementation="cudnn")
        mask = document_mask(segment_ids_BxL, segment_ids_BxL, jnp.arange(L))
        return einsum_attention(*arguments, mask)


def _attend_from_own(backend: str, mesh: Mesh | None, q, k, v, segments_BxL, slots_L):
    """Inside `shard_map`: a device's own queries on the keys and values of whole sequences.

    Args:
        slots_L: which positions of the sequences the queries are; None: all.
    """
    k, v, all_segments = (_of_sequence(x, 1, mesh) for x in (k, v, segments_BxL))
    if backend == "tokamax":
        return document_attention.document_attention(q, k, v, all_segments, slots_L)
    if backend == "chunked":
        return chunked_attention(q, k, v, segments_BxL, all_segments, slots_L)
    return einsum_attention(q, k, v, document_mask(segments_BxL, all_segments, slots_L))


def _of_sequence(x: jax.Array, axis: int, mesh: Mesh | None) -> jax.Array:
    """Inside `shard_map`: all positions of the sequences, in their order; own ones come in."""
    return in_sequence_order(gather(x, CONTEXT, axis, mesh), axis, _context_devices(mesh))


def _context_devices(mesh: Mesh | None) -> int:
    return 1 if mesh is None else mesh.shape[CONTEXT]


def _for_each_device(x: jax.Array, axis: int, mesh: Mesh | None) -> jax.Array:
    """As many KV heads as devices: the query heads of one all read the same."""
    shared = _devices_of_head(x.shape[axis], mesh)
    return jnp.repeat(x, shared, axis=axis) if shared > 1 else x


def _splash(q_BxHxDxL, k_BxKxDxL, v_BxKxDxL, angles, segment_ids_BxL, mesh: Mesh | None):
    """The output [B, H, Dh, L]. angles: see `kernels.heads.to_heads`; None: rotated before."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    interpret = device.platform != "tpu"

    Dh, L = q_BxHxDxL.shape[2:]
    devices = _context_devices(mesh)
    masks = causal_masks(context_slots(L, devices), devices, Dh) if devices > 1 else None

    def local(q, k, v, segments, angles, masks):
        scale, of_queries = q.shape[2] ** -0.5, None
        if angles is None:
            q = q * scale
        else:
            of_queries = tuple(a * scale for a in angles)
        q, k, v = (
            to_heads(x, turned, interpret)
            for x, turned in ((q, of_queries), (k, angles), (v, None))
        )
        k, v = (_of_sequence(x, 2, mesh) for x in (k, v))
        return splash(q, k, v, segments, interpret, _of_sequence(segments, 1, mesh), masks)

    k_BxKxDxL, v_BxKxDxL = (_for_each_device(x, 1, mesh) for x in (k_BxKxDxL, v_BxKxDxL))
    heads = PartitionSpec(BATCH_AXES, "tensor", None, CONTEXT)
    of_angles = PartitionSpec(BATCH_AXES, None, CONTEXT)
    # Of a single device there are none; else queries are in the order of the devices.
    of_masks = jax.tree.map(lambda x: PartitionSpec(*(None,) * (x.ndim > 1), CONTEXT), masks)
    specs = (*(heads,) * 3, token_spec(), of_angles, of_masks)
    arguments = q_BxHxDxL, k_BxKxDxL, v_BxKxDxL, segment_ids_BxL, angles, masks
    return _on_devices(local, mesh, specs, *arguments)


def _on_devices(local, mesh: Mesh | None, specs: tuple, *arguments):
    """A kernel of each device on its own sequences, positions and heads."""
    if mesh is None:
        return local(*arguments)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(
        *arguments
    )
