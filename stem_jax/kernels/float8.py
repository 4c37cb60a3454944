"""Matmuls of projections in numbers of 8 bits, by the library qwix: twice the speed of bfloat16.

Values and weights are rounded to e4m3 (three bits of mantissa), gradients to e5m2. Each vector that
is summed over has a scale of its own, from the largest of its numbers as they are now: nothing is
kept from step to step. Sums are float32.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp

from stem_jax.errors import InputError

_VALUES, _GRADIENTS = "float8_e4m3fn", "float8_e5m2"
# Compute capability of the first NVIDIA GPUs that multiply such numbers.
_FIRST = 8.9


def missing(device: jax.Device) -> str | None:
    """Why a device does not take these matmuls; None if it does. CPUs do what GPUs would."""
    if device.platform not in ("gpu", "cpu"):
        return f"needs a GPU, this is {device.platform}"
    if device.platform == "gpu":
        # Of AMD's GPUs a name, such as gfx942.
        capability = str(device.compute_capability)
        if not capability.replace(".", "").isdigit() or float(capability) < _FIRST:
            return f"needs compute capability {_FIRST}, this GPU has {capability}"
    if importlib.util.find_spec("qwix") is None:
        return 'needs qwix (pip install "qwix<0.2")'
    return None


def check_float8(matmul_dtype: str | None, device: jax.Device) -> None:
    """Raises InputError for `model.matmul_dtype` on a device that does not take it."""
    if matmul_dtype is not None and (reason := missing(device)):
        raise InputError(f"model.matmul_dtype={matmul_dtype} {reason}; set it to none")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(x_BxLxI: jax.Array, kernel: jax.Array, output_first: bool) -> jax.Array:
    """x W as [B, L, O] in the dtype of x; W is [I, O], or [O, I] with `output_first`."""
    return _forward(x_BxLxI, kernel, output_first)[0]


def _forward(x_BxLxI, kernel, output_first):
    weights, summed = ("oi", 1) if output_first else ("io", 0)
    y_BxLxO = _product(f"bli,{weights}->blo", (x_BxLxI, _VALUES, (2,)), (kernel, _VALUES, summed))
    return y_BxLxO, (x_BxLxI, kernel)


def _backward(output_first, kept, gradient_BxLxO):
    x_BxLxI, kernel = kept
    weights, summed = ("oi", 0) if output_first else ("io", 1)
    by_outputs = gradient_BxLxO, _GRADIENTS, (2,)
    dx_BxLxI = _product(f"blo,{weights}->bli", by_outputs, (kernel, _VALUES, summed))
    of_x, of_gradient = (x_BxLxI, _VALUES, (0, 1)), (gradient_BxLxO, _GRADIENTS, (0, 1))
    return dx_BxLxI, _product(f"bli,blo->{weights}", of_x, of_gradient).astype(kernel.dtype)


project.defvjp(_forward, _backward)


def _product(spec: str, left, right) -> jax.Array:
    """An einsum of two (array, dtype, axes that are summed over), in the dtype of the first."""
    # Imported where it is wanted: it takes seconds, and others need not have it.
    import qwix

    def rounded(array, dtype, summed):
        summed = (summed,) if isinstance(summed, int) else summed
        others = [axis for axis in range(array.ndim) if axis not in summed]
        return qwix.quantize(array, dtype, channelwise_axes=others, scale_dtype=jnp.float32)

    return qwix.einsum(spec, rounded(*left), rounded(*right)).astype(left[0].dtype)
