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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coast:
    """What catching up does to rows, as numbers of each row; [O] or, of a group of terms, [G, O].

    weight, over: C and a of a group, see above. decay, mu, nu: factors of the row and its moments.
    """

    weight: jax.Array
    over: jax.Array
    decay: jax.Array
    mu: jax.Array
    nu: jax.Array


def coast_of(
    spec: TableSpec,
    last_step_O: jax.Array,
    step: jax.Array,
    history: UpdateHistory,
    edges: tuple[int, ...] | None = None,
) -> Coast:
    """From each row's last update to `step` completed updates; arguments as for `catch_up`."""
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
    weights, overs = [], []
    for first, end in zip(edges, (*edges[1:], terms + 1), strict=True):
        group = slice(first - 1, end - 1)
        weight_O = jnp.sum(c_OxJ[:, group], axis=1)
        over_a_O = jnp.sum(over_a_OxJ[:, group], axis=1)
        weights.append(weight_O)
        overs.append(weight_O / jnp.where(over_a_O > 0, over_a_O, 1.0))
    missed = missed_O.astype(jnp.float32)
    return Coast(
        weight=jnp.stack(weights),
        over=jnp.stack(overs),
        decay=history.decay_between(last_step_O, step),
        mu=spec.beta1**missed,
        nu=spec.beta2**missed,
    )


def coasted(spec: TableSpec, block: RowBlock, coast: Coast) -> RowBlock:
    """Rows [S, O, F] after their coast, without gradients."""
    root = jnp.sqrt(block.nu)
    moved = jnp.zeros_like(block.rows)
    for weight_O, a_O in zip(coast.weight, coast.over, strict=True):
        moved += weight_O[:, None] / (a_O[:, None] * root + spec.epsilon)
    return RowBlock(
        rows=block.rows * coast.decay[:, None] - moved * block.mu,
        mu=block.mu * coast.mu[:, None],
        nu=block.nu * coast.nu[:, None],
    )


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
    return coasted(spec, block, coast_of(spec, last_step_O, step, history, edges))


def _one_minus_power(beta: float, exponent: jax.Array) -> jax.Array:
    """1 - beta^exponent without cancellation for beta near 1."""
    return -jnp.expm1(exponent * math.log(beta)) if beta > 0 else jnp.ones_like(exponent)


@dataclasses.dataclass(frozen=True)
class RowOptimizer:
    """Reads and updates the rows of one shard; `spec.optimizer` names the rule.

    Row numbers count within the shard; those past its end are padding, read as any row and written
    nowhere.

    edges: of the groups of terms, see `catch_up`. piece: rows of one vector that are worked on at a
    time; None for all rows and vectors. A few fit the fast memory of a TPU with all that is made of
    them, so each is read once and written once.
    """

    spec: TableSpec
    edges: tuple[int, ...] | None = None
    piece: int | None = None

    @part("row_optimizer")
    def read(self, state: TableState, rows_O, step, history: UpdateHistory) -> RowBlock:
        """Rows as the next forward sees them, after `step` completed updates."""
        # Padding reads the last row.
        rows_O = jnp.minimum(rows_O, state.last_step.shape[0] - 1)
        block = RowBlock(state.rows[:, rows_O], state.mu[:, rows_O], state.nu[:, rows_O])
        return self._now(block, self._coast(state, rows_O, step, history))

    @part("row_optimizer")
    def read_as(self, state: TableState, rows_O, step, history: UpdateHistory, dtype) -> jax.Array:
        """The rows alone of `read`, [S, O, F] in another dtype."""
        if self._whole(rows_O):
            return self.read(state, rows_O, step, history).rows.astype(dtype)
        rows_O = jnp.minimum(rows_O, state.last_step.shape[0] - 1)
        coast = self._coast(state, rows_O, step, history)

        def one_piece(found, vector, first, _):
            block, part_of = self._piece_of((state.rows, state.mu, state.nu), rows_O, vector, first)
            rows = self._now(block, jax.tree.map(part_of, coast)).rows.astype(dtype)
            return jax.lax.dynamic_update_slice(found, rows, (vector, first, 0))

        shape = (len(state.rows), len(rows_O), state.rows.shape[2])
        return self._by_piece(one_piece, jax.lax.empty(shape, dtype), len(rows_O))

    @part("row_optimizer")
    def update(
        self,
        state: TableState,
        rows_O,
        gradient_SxOxF,
        step,
        keep,
        history: UpdateHistory,
        scale: jax.Array | float = 1.0,
    ) -> TableState:
        """Applies update `step + 1`.

        Args:
            gradient_SxOxF: summed gradients.
            step: scalar int32, updates completed before this one.
            keep: scalar bool; False leaves every row where it is.
            scale: scalar that the gradients are multiplied with.
        """
        rate = history.rates[step]
        size = state.last_step.shape[0]
        # Padding, and everything when nothing is kept, goes past the end, to places all distinct.
        outside_O = size + jnp.arange(rows_O.shape[0])
        touched = jnp.where(keep & (rows_O < size), rows_O, outside_O)
        last_step = state.last_step.at[touched].set(step + 1, mode="drop", unique_indices=True)
        if self.spec.optimizer == "dense_adamw":
            gradient = jnp.zeros_like(state.rows)
            gradient = gradient.at[:, touched].set(
                gradient_SxOxF * scale, mode="drop", unique_indices=True
            )
            old = RowBlock(state.rows, state.mu, state.nu)
            new = adamw(self.spec, old, gradient, rate, step + 1)
            kept = jax.tree.map(lambda fresh, before: jnp.where(keep, fresh, before), new, old)
            return TableState(kept.rows, kept.mu, kept.nu, last_step)
        arrays = state.rows, state.mu, state.nu
        if self._whole(rows_O):
            block = self.read(state, rows_O, step, history)
            block = adamw(self.spec, block, gradient_SxOxF * scale, rate, step + 1)
            written = (block.rows, block.mu, block.nu)
            arrays = (
                whole.at[:, touched].set(part, mode="drop", unique_indices=True)
                for whole, part in zip(arrays, written, strict=True)
            )
            return TableState(*arrays, last_step)
        rows_O = jnp.minimum(rows_O, size - 1)
        coast = self._coast(state, rows_O, step, history)

        def one_piece(arrays, vector, first, new):
            block, part_of = self._piece_of(arrays, rows_O, vector, first)
            gradient = jax.lax.dynamic_slice(
                gradient_SxOxF, (vector, first, 0), (1, *block.rows.shape[1:])
            )
            block = self._now(block, jax.tree.map(part_of, coast))
            block = adamw(self.spec, block, gradient * scale, rate, step + 1)
            # What the piece before has updated was read anew, and goes nowhere.
            places = jnp.where(new, part_of(touched), part_of(outside_O))
            return tuple(
                whole.at[vector, places].set(part[0], mode="drop", unique_indices=True)
                for whole, part in zip(arrays, (block.rows, block.mu, block.nu), strict=True)
            )

        return TableState(*self._by_piece(one_piece, arrays, len(rows_O)), last_step)

    def _whole(self, rows_O: jax.Array) -> bool:
        return self.piece is None or len(rows_O) <= self.piece

    def _coast(self, state: TableState, rows_O, step, history) -> Coast | None:
        if self.spec.optimizer != "deferred_adamw":
            return None
        return coast_of(self.spec, state.last_step[rows_O], step, history, self.edges)

    def _now(self, block: RowBlock, coast: Coast | None) -> RowBlock:
        return block if coast is None else coasted(self.spec, block, coast)

    def _piece_of(self, arrays, rows_O, vector, first):
        """A piece's block [1, piece, F], and what cuts its part out of numbers by row."""

        def part_of(numbers):
            axis = numbers.ndim - 1
            return jax.lax.dynamic_slice_in_dim(numbers, first, self.piece, axis)

        places = part_of(rows_O)
        return RowBlock(*(array[vector, places][None] for array in arrays)), part_of

    def _by_piece(self, one_piece, found, number: int):
        """`found` after `one_piece(found, vector, first, new)` of each vector and piece of rows.

        new: [piece], whether a row was in no piece before this one.
        """
        pieces = -(-number // self.piece)

        def one(turn, found):
            vector, first = turn // pieces, turn % pieces * self.piece
            begin = jnp.minimum(first, number - self.piece)
            return one_piece(found, vector, begin, begin + jnp.arange(self.piece) >= first)

        return jax.lax.fori_loop(0, self.spec.num_layers * pieces, one, found)
