"""AdamW on rows: one definition, for every optimizer and every placement.

The formula is the official one (torch.optim.AdamW): decoupled decay first, then the bias-corrected
step with the epsilon outside the square root. `t` counts completed updates; update t + 1 uses
learning rate `learning_rates[t]`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from stem_jax.tables.spec import TableSpec, TableState


def adamw(spec: TableSpec, rows, mu, nu, gradient, learning_rate, step):
    """One AdamW update, element by element.

    Args:
        rows, mu, nu, gradient: arrays of one shape, float32.
        learning_rate: scalar, of this update.
        step: scalar int32, the number of this update, from 1.

    Returns:
        The new rows, mu, nu.
    """
    mu = spec.beta1 * mu + (1 - spec.beta1) * gradient
    nu = spec.beta2 * nu + (1 - spec.beta2) * gradient * gradient
    step = step.astype(jnp.float32)
    corrected = mu / (1 - spec.beta1**step)
    scale = jnp.sqrt(nu / (1 - spec.beta2**step)) + spec.epsilon
    rows = rows * (1 - learning_rate * spec.weight_decay) - learning_rate * corrected / scale
    return rows, mu, nu


@dataclasses.dataclass(frozen=True)
class DenseAdamW:
    """Every row moves every step, as in the official code; the oracle for the cheaper ones."""

    spec: TableSpec

    def read(self, state: TableState, local_rows_O: jax.Array) -> jax.Array:
        """Rows [O, S, F] as the next forward sees them."""
        return state.rows[local_rows_O]

    def update(self, state: TableState, local_rows_O, gradient_OxSxF, learning_rates, step, keep):
        """Applies one update to this shard.

        Args:
            state: the local shard.
            local_rows_O: row numbers within the shard; out of range is dropped.
            gradient_OxSxF: summed, clipped gradients of those rows.
            learning_rates: [T] float32 of every update, with the multiplier.
            step: scalar int32, updates completed before this one.
            keep: scalar bool; False leaves the state as it is.
        """
        gradient = jnp.zeros_like(state.rows)
        gradient = gradient.at[local_rows_O].set(gradient_OxSxF, mode="drop", unique_indices=True)
        new = adamw(
            self.spec, state.rows, state.mu, state.nu, gradient, learning_rates[step], step + 1
        )
        rows, mu, nu = (
            jnp.where(keep, fresh, old)
            for fresh, old in zip(new, (state.rows, state.mu, state.nu), strict=True)
        )
        touched = state.last_step.at[local_rows_O].set(step + 1, mode="drop", unique_indices=True)
        last_step = jnp.where(keep, touched, state.last_step)
        return TableState(rows, mu, nu, last_step)


def make_row_optimizer(spec: TableSpec) -> DenseAdamW:
    """The row optimizer named in the spec."""
    return {"dense_adamw": DenseAdamW}[spec.optimizer](spec)
