"""One update of rows with their gradients: AdamW's rule, and that of one moment for each vector.

adamw: the official formula (torch.optim.AdamW): decoupled decay first, then the bias-corrected step
with the epsilon outside the square root.

rowwise: as AdamW without a first moment, whose second is one number v for each vector of a row:

    v <- b2 v + (1 - b2) mean(g^2),     p <- p (1 - lr wd) - lr g / (sqrt(v / (1 - b2^t)) + eps)
"""

import math

import jax
import jax.numpy as jnp

from stem_jax.tables.row_coast import RowBlock
from stem_jax.tables.spec import ROWWISE, TableSpec

# Parts of a row that are summed each on its own, so that as many devices may have them.
_PARTS = 16
# Columns that are added one after the other where they cannot be halved.
_ONE_BY_ONE = 16


def updated(
    spec: TableSpec, block: RowBlock, gradient, squares, learning_rate, left_mu, left_nu
) -> RowBlock:
    """One update, element by element.

    Args:
        gradient: float32, of the shape of the rows.
        squares: what `mean_squares` makes of the gradient of whole rows; None for adamw.
        learning_rate: scalar, of this update.
        left_mu, left_nu: see `left`.
    """
    if spec.moments == ROWWISE:
        v = spec.beta2 * block.v + (1 - spec.beta2) * squares
        scale = jnp.sqrt(v / left_nu) + spec.epsilon
        decayed = block.rows * (1 - learning_rate * spec.weight_decay)
        return RowBlock(decayed - learning_rate * gradient / scale, v=v)
    mu = spec.beta1 * block.mu + (1 - spec.beta1) * gradient
    nu = spec.beta2 * block.nu + (1 - spec.beta2) * gradient * gradient
    corrected = mu / left_mu
    scale = jnp.sqrt(nu / left_nu) + spec.epsilon
    decayed = block.rows * (1 - learning_rate * spec.weight_decay)
    return RowBlock(decayed - learning_rate * corrected / scale, mu, nu)


def adamw(spec: TableSpec, block: RowBlock, gradient, learning_rate, step) -> RowBlock:
    """One update of a table with AdamW's moments. step: scalar int32, its number, from 1."""
    return updated(spec, block, gradient, None, learning_rate, *left(spec, step))


def left(spec: TableSpec, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What of both moments an update, from 1, leaves to gradients: 1 - beta^step."""
    step = step.astype(jnp.float32)
    return 1 - spec.beta1**step, 1 - spec.beta2**step


def mean_squares(gradient_SxOxF: jax.Array, devices: int) -> jax.Array:
    """Means of squares [S, O, 1] over the columns of whole rows, the same on every device.

    Sums are taken in an order of their own, not a compiler's, which depends on the number of rows;
    and in the same one on 1, 2, 4, 8 or 16 devices, where the width divides by 16.

    Args:
        devices: along the axis `tensor`, each with its columns.
    """
    vectors, rows, width = gradient_SxOxF.shape
    # Alone, so that no compiler makes one rounding of a square and a sum.
    squares = jax.lax.optimization_barrier(jnp.square(gradient_SxOxF))
    parts = math.gcd(width * devices, _PARTS)
    own = parts // devices if parts % devices == 0 else 1
    sums_SxOxN = _sum(squares.reshape(vectors, rows, own, width // own))
    if devices > 1:
        sums_SxOxN = jax.lax.all_gather(sums_SxOxN, "tensor", axis=2, tiled=True)
    return _sum(sums_SxOxN)[..., None] / (width * devices)


def _sum(values: jax.Array) -> jax.Array:
    """Over the last axis, the second half onto the first."""
    while (size := values.shape[-1]) % 2 == 0:
        values = values[..., : size // 2] + values[..., size // 2 :]
    if size > _ONE_BY_ONE:
        return jnp.sum(values, axis=-1)
    total = values[..., 0]
    for place in range(1, size):
        total += values[..., place]
    return total
