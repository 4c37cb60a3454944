"""AdamW on rows: one definition of the update, for every optimizer and every placement.

The formula is the official one (torch.optim.AdamW): decoupled decay first, then the bias-corrected
step with the epsilon outside the square root. Three optimizers share it:

dense_adamw     every row moves every step, as in the official code; the oracle for the others.
lazy_adamw      only the rows of a batch move; the others neither decay nor coast on momentum, so it
                is another optimizer.
deferred_adamw  only the rows of a batch are touched, and each first catches up on the k updates it
                missed, so that it stands where dense AdamW would have brought it.

A row last updated at s and read at t = s + k has coasted on its first moment m under its second
moment v, both shrinking without a gradient:

    m <- b1^k m,  v <- b2^k v
    p <- p * prod(1 - lr_i wd) - sum_{j=1..k} c_j m / (a_j sqrt(v) + eps)
    c_j = lr_{s+j} * prod_{i=s+j+1..t}(1 - lr_i wd) * b1^j / (1 - b1^{s+j})
    a_j = sqrt(b2^j / (1 - b2^{s+j}))

c_j and a_j are numbers per row. The terms are cut into a few groups; a group with the weight
C = sum c_j gets the one a = C / sum(c_j / a_j), exact for eps -> 0. That takes one square root
and one division per group and element, whatever k is.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from stem_jax.parts import part
from stem_jax.tables.coast_groups import group_edges, num_terms
from stem_jax.tables.spec import TableSpec, TableState
from stem_jax.tables.update_history import UpdateHistory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowBlock:
    """Rows [S, O, F] with their slot variables, all float32, as of one update."""

    rows: jax.Array
    mu: jax.Array
    nu: jax.Array


def adamw(spec: TableSpec, block: RowBlock, gradient, learning_rate, step) -> RowBlock:
    """One AdamW update, element by element.

    Args:
        gradient: float32, of the shape of the rows.
        learning_rate: scalar, of this update.
        step: scalar int32, the number of this update, from 1.
    """
    mu = spec.beta1 * block.mu + (1 - spec.beta1) * gradient
    nu = spec.beta2 * block.nu + (1 - spec.beta2) * gradient * gradient
    step = step.astype(jnp.float32)
    corrected = mu / (1 - spec.beta1**step)
    scale = jnp.sqrt(nu / (1 - spec.beta2**step)) + spec.epsilon
    decayed = block.rows * (1 - learning_rate * spec.weight_decay)
    return RowBlock(decayed - learning_rate * corrected / scale, mu, nu)


def catch_up(
    spec: TableSpec,
    block: RowBlock,
    last_step_O: jax.Array,
    step: jax.Array,
    history: UpdateHistory,
    edges: tuple[int, ...] | None = None,
) -> RowBlock:
    """Brings rows from their last update to `step` completed updates, without gradients.

    Args:
        block: rows [S, O, F] as of `last_step_O`.
        last_step_O: int32, the last update of each row; 0 for a row that never had one.
        step: scalar int32, completed updates.
        edges: first terms of the groups; None: `group_edges` of the betas. `range(1, n)` gives
            every term its own.
    """
    terms = num_terms(spec.beta1, spec.beta2)
    edges = edges or group_edges(spec.beta1, spec.beta2)
    terms_J = jnp.arange(1, terms + 1)
    missed_O = step - last_step_O
    update_OxJ = last_step_O[:, None] + terms_J
    inside_OxJ = terms_J <= missed_O[:, None]
    # Updates past `step` are masked; their number only has to exist.
    update_OxJ = jnp.clip(update_OxJ, 1, jnp.maximum(step, 1))
    j = terms_J.astype(jnp.float32)
    exponent_OxJ = update_OxJ.astype(jnp.float32)
    rate_OxJ = history.rates[update_OxJ - 1]
    scale_OxJ = rate_OxJ * history.decay_between(update_OxJ, step)
    scale_OxJ = jnp.where(inside_OxJ, scale_OxJ, 0.0) / _one_minus_power(spec.beta1, exponent_OxJ)
    c_OxJ = scale_OxJ * spec.beta1**j
    # One power of the ratio: b2^j alone leaves float32 long before the terms die out.
    over_a_OxJ = scale_OxJ * jnp.sqrt(_one_minus_power(spec.beta2, exponent_OxJ))
    over_a_OxJ *= (spec.beta1 / math.sqrt(spec.beta2)) ** j

    def spread(numbers_O):
        return numbers_O[:, None]

    root = jnp.sqrt(block.nu)
    moved = jnp.zeros_like(block.rows)
    for first, end in zip(edges, (*edges[1:], terms + 1), strict=True):
        group = slice(first - 1, end - 1)
        weight_O = jnp.sum(c_OxJ[:, group], axis=1)
        over_a_O = jnp.sum(over_a_OxJ[:, group], axis=1)
        a_O = weight_O / jnp.where(over_a_O > 0, over_a_O, 1.0)
        moved += spread(weight_O) / (spread(a_O) * root + spec.epsilon)
    missed = missed_O.astype(jnp.float32)
    return RowBlock(
        rows=block.rows * spread(history.decay_between(last_step_O, step)) - moved * block.mu,
        mu=block.mu * spread(spec.beta1**missed),
        nu=block.nu * spread(spec.beta2**missed),
    )


def _one_minus_power(beta: float, exponent: jax.Array) -> jax.Array:
    """1 - beta^exponent without cancellation for beta near 1."""
    return -jnp.expm1(exponent * math.log(beta)) if beta > 0 else jnp.ones_like(exponent)


@dataclasses.dataclass(frozen=True)
class RowOptimizer:
    """Reads and updates the rows of one shard; `spec.optimizer` names the rule.

    Row numbers count within the shard; those past its end are padding, read as any row and written
    nowhere.
    """

    spec: TableSpec
    edges: tuple[int, ...] | None = None

    @part("row_optimizer")
    def read(self, state: TableState, rows_O, step, history: UpdateHistory) -> RowBlock:
        """Rows as the next forward sees them, after `step` completed updates."""
        # Padding reads the last row.
        rows_O = jnp.minimum(rows_O, state.last_step.shape[0] - 1)
        block = RowBlock(state.rows[:, rows_O], state.mu[:, rows_O], state.nu[:, rows_O])
        if self.spec.optimizer != "deferred_adamw":
            return block
        return catch_up(self.spec, block, state.last_step[rows_O], step, history, self.edges)

    @part("row_optimizer")
    def update(
        self, state: TableState, rows_O, gradient_SxOxF, step, keep, history: UpdateHistory
    ) -> TableState:
        """Applies update `step + 1`.

        Args:
            gradient_SxOxF: summed, clipped gradients.
            step: scalar int32, updates completed before this one.
            keep: scalar bool; False leaves every row where it is.
        """
        rate = history.rates[step]
        size = state.last_step.shape[0]
        # Padding, and everything when nothing is kept, goes past the end, to places all distinct.
        outside_O = size + jnp.arange(rows_O.shape[0])
        touched = jnp.where(keep & (rows_O < size), rows_O, outside_O)
        last_step = state.last_step.at[touched].set(step + 1, mode="drop", unique_indices=True)
        if self.spec.optimizer == "dense_adamw":
            gradient = jnp.zeros_like(state.rows)
            gradient = gradient.at[:, touched].set(gradient_SxOxF, mode="drop", unique_indices=True)
            old = RowBlock(state.rows, state.mu, state.nu)
            new = adamw(self.spec, old, gradient, rate, step + 1)
            kept = jax.tree.map(lambda fresh, before: jnp.where(keep, fresh, before), new, old)
            return TableState(kept.rows, kept.mu, kept.nu, last_step)
        block = self.read(state, rows_O, step, history)
        block = adamw(self.spec, block, gradient_SxOxF, rate, step + 1)

        def write(whole, part):
            return whole.at[:, touched].set(part, mode="drop", unique_indices=True)

        return TableState(
            write(state.rows, block.rows),
            write(state.mu, block.mu),
            write(state.nu, block.nu),
            last_step,
        )
