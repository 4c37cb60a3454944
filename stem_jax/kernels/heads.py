"""Heads into the layout of the TPU's attention kernel and back, rotated on the way.

A projection gives [B, heads * Dh, L]: positions lie along the lanes, so nothing is padded where Dh
is below 128, and the halves of a head that rotary positions turn are blocks of sublanes. The
attention kernel (`kernels.splash`) reads queries, keys and values and gives its output as they are;
it reads the output's gradient and gives all others as [B, heads, L, Dh]. The compiler's own copies
between the two take three times as long as reading and writing them once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

# Positions that a kernel takes at a time; the largest that divides their number.
_BLOCKS = (2048, 1024, 512, 256, 128)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def to_heads(x_BxHxDxL: jax.Array, angles, interpret: bool = False) -> jax.Array:
    """Queries, keys or values as [B, H, L, Dh], which lie as [B, H, Dh, L] for the kernel.

    Args:
        x_BxHxDxL: a projection, cut into heads; L a multiple of 128.
        angles: cosines and sines [B, Dh / 2, L] float32 by which pairs (i, i + Dh / 2) are turned;
            None: not rotated. They have no gradient.
        interpret: without a TPU.
    """
    if angles is not None:
        x_BxHxDxL = _moved(x_BxHxDxL, angles, interpret)
    return x_BxHxDxL.swapaxes(-1, -2)


def _to_heads_forward(x_BxHxDxL, angles, interpret):
    return to_heads(x_BxHxDxL, angles, interpret), angles


def _to_heads_backward(interpret, angles, gradient_BxHxLxD):
    nothing = jax.tree.map(jnp.zeros_like, angles)
    if angles is not None:
        cos, sin = angles
        angles = cos, -sin
    return _moved(gradient_BxHxLxD, angles, interpret, turn_in=True), nothing


to_heads.defvjp(_to_heads_forward, _to_heads_backward)


def gradient_to_heads(gradient_BxHxDxL: jax.Array, out_BxHxDxL: jax.Array, interpret: bool = False):
    """The gradient of the kernel's output as [B, H, L, Dh], which it reads, and the sums [B, H, L]
    float32 of output times gradient.
    """
    B, H, Dh, L = gradient_BxHxDxL.shape
    size = _block(L)
    read = pl.BlockSpec((None, None, Dh, size), lambda b, h, part: (b, h, 0, part))
    heads_BxHxLxD, sums_BxHx1xL = pl.pallas_call(
        _turn_gradient,
        grid=(B, H, L // size),
        in_specs=[read, read],
        out_specs=[
            pl.BlockSpec((None, None, size, Dh), lambda b, h, part: (b, h, part, 0)),
            pl.BlockSpec((None, None, 1, size), lambda b, h, part: (b, h, 0, part)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B, H, L, Dh), gradient_BxHxDxL.dtype),
            jax.ShapeDtypeStruct((B, H, 1, L), jnp.float32),
        ],
        interpret=interpret,
        name="turned_gradient",
    )(gradient_BxHxDxL, out_BxHxDxL)
    return heads_BxHxLxD, sums_BxHx1xL[:, :, 0]


def _turn_gradient(gradient_ref, out_ref, heads_ref, sums_ref):
    gradient_DxL = gradient_ref[...]
    heads_ref[...] = gradient_DxL.T
    products_DxL = gradient_DxL.astype(jnp.float32) * out_ref[...].astype(jnp.float32)
    sums_ref[...] = jnp.sum(products_DxL, axis=0, keepdims=True)


def _moved(x, angles, interpret: bool, turn_in: bool = False):
    """Reads [B, H, Dh, L] (or with `turn_in` [B, H, L, Dh]) and writes [B, H, Dh, L], rotated if
    asked to.
    """
    B, H, Dh, L = (x.shape[i] for i in ((0, 1, 3, 2) if turn_in else (0, 1, 2, 3)))
    size = _block(L)
    turned = pl.BlockSpec((None, None, size, Dh), lambda b, part, h: (b, h, part, 0))
    spec = pl.BlockSpec((None, None, Dh, size), lambda b, part, h: (b, h, 0, part))
    # Heads last: the angles of a part are fetched once for all of them.
    angle_spec = pl.BlockSpec((None, Dh // 2, size), lambda b, part, h: (b, 0, part))
    return pl.pallas_call(
        functools.partial(_move, turn_in=turn_in),
        grid=(B, L // size, H),
        in_specs=[turned if turn_in else spec, *([angle_spec] * 2 if angles is not None else [])],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct((B, H, Dh, L), x.dtype),
        interpret=interpret,
        name="rotated_heads" if angles is not None else "turned_heads",
    )(x, *(angles or ()))


def _move(x_ref, *refs, turn_in: bool):
    *angles, out_ref = refs
    x_DxL = x_ref[...].T if turn_in else x_ref[...]
    if angles:
        cos, sin = (ref[...] for ref in angles)
        first, second = jnp.split(x_DxL.astype(jnp.float32), 2, axis=0)
        turned = [first * cos - second * sin, second * cos + first * sin]
        x_DxL = jnp.concatenate(turned, axis=0).astype(x_DxL.dtype)
    out_ref[...] = x_DxL


def _block(length: int) -> int:
    return next(size for size in _BLOCKS if length % size == 0)
