"""Norm and projection."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from stem_jax.kernels import float8
from stem_jax.kernels.kept_names import projection
from stem_jax.mesh import parameter_spec
from stem_jax.model.draws import Draw
from stem_jax.parts import part


def truncated_normal(
    key: jax.Array | None,
    shape: tuple[int, ...],
    std: float,
    cut: float,
    logical_axes: tuple[str, ...],
) -> Any:
    """Normal samples of standard deviation `std` (before the cut), cut at +-`cut`, float32.

    Without a key it is said what is to be drawn.

    Outside of a trace they come from a program that all draws of a shape share, and lie on the mesh
    that is set as their axes say. All parameters of a model in one program, each from a key that is
    a constant, take minutes to compile for a GPU.
    """
    if key is None:
        return Draw(shape, std, cut, logical_axes)
    if isinstance(key, jax.core.Tracer):
        return _samples(key, shape, std, cut)
    mesh = jax.sharding.get_mesh()
    place = None if mesh.empty else NamedSharding(mesh, parameter_spec(logical_axes))
    return _sampler(shape, std, cut, place)(key)


def _samples(key, shape, std, cut):
    return jax.random.truncated_normal(key, -cut / std, cut / std, shape, jnp.float32) * std


@functools.cache
def _sampler(shape, std, cut, place):
    return jax.jit(lambda key: _samples(key, shape, std, cut), out_shardings=place)


class Linear(nnx.Module):
    """y = x W without bias; W is [in, out], or [out, in] with `output_first`.

    float8: multiplies in it where x is by position, see `kernels.float8`.
    """

    # What is added to y, of x; see `model.lora`.
    adapter: nnx.Module | None = None

    def __init__(
        self, shape, logical_axes, std, cut, *, rngs: nnx.Rngs, output_first=False, float8=False
    ):
        value = truncated_normal(rngs.params(), shape, std, cut, logical_axes)
        self.kernel = nnx.Param(value, logical_axes=logical_axes)
        self.output_first = output_first
        self.float8 = float8

    @part("block_matmuls")
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        if self.float8:
            y = float8.project(x, kernel, self.output_first)
        else:
            y = (_project_back if self.output_first else _project)(x, kernel)
        return projection(y if self.adapter is None else y + self.adapter(x))

    @part("block_matmuls")
    def positions_last(self, x_BxLxI: jax.Array) -> jax.Array:
        """y as [B, out, L]."""
        kernel_IxO = self.kernel[...].astype(x_BxLxI.dtype)
        y_BxOxL = _project_positions_last(x_BxLxI, kernel_IxO)
        if self.adapter is not None:
            y_BxOxL += self.adapter(x_BxLxI).swapaxes(1, 2)
        return projection(y_BxOxL)

    @part("block_matmuls")
    def of_positions_last(self, x_BxIxL: jax.Array) -> jax.Array:
        """y as [B, L, out] of x [B, in, L]."""
        kernel_IxO = self.kernel[...].astype(x_BxIxL.dtype)
        y_BxLxO = jnp.einsum("bil,io->blo", x_BxIxL, kernel_IxO)
        if self.adapter is not None:
            y_BxLxO += self.adapter(x_BxIxL.swapaxes(1, 2))
        return projection(y_BxLxO)


@jax.custom_vjp
def _project(x: jax.Array, kernel_IxO: jax.Array) -> jax.Array:
    return x @ kernel_IxO


def _project_backward(residuals, gradient):
    x, kernel_IxO = residuals
    return gradient @ kernel_IxO.T, jnp.einsum("...i,...o->io", x, gradient)


# Autodiff writes the weight gradient as (g^T x)^T; on CPUs that turns the activations of width F.
_project.defvjp(lambda x, kernel: (_project(x, kernel), (x, kernel)), _project_backward)


@jax.custom_vjp
def _project_positions_last(x_BxLxI: jax.Array, kernel_IxO: jax.Array) -> jax.Array:
    return jnp.einsum("bli,io->bol", x_BxLxI, kernel_IxO)


def _project_positions_last_backward(residuals, gradient_BxOxL):
    x_BxLxI, kernel_IxO = residuals
    dx_BxLxI = jnp.einsum("bol,io->bli", gradient_BxOxL, kernel_IxO)
    return dx_BxLxI, jnp.einsum("bli,bol->io", x_BxLxI, gradient_BxOxL)


_project_positions_last.defvjp(
    lambda x, kernel: (_project_positions_last(x, kernel), (x, kernel)),
    _project_positions_last_backward,
)


def _project_back(x: jax.Array, kernel_OxI: jax.Array) -> jax.Array:
    return x @ kernel_OxI.T


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32 and returned in the dtype of x.

    initial: every number of the scale at first.
    """

    def __init__(self, dim: int, eps: float, initial: float = 1.0):
        scale = jnp.full((dim,), initial, jnp.float32)
        self.scale = nnx.Param(scale, logical_axes=("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * inverse_rms * self.scale[...].astype(jnp.float32)).astype(x.dtype)
