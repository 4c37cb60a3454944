"""AdamW on rows: one definition of the update, for every optimizer and every placement.

The formula is the official one (torch.optim.AdamW): decoupled decay first, then the bias-corrected
step with the epsilon outside the square root. Three optimizers share it:

dense_adamw     every row moves every step, as in the official code; the oracle for the others.
lazy_adamw      only the rows of a batch move; the others neither decay nor coast on momentum, so it
                is another optimizer.
deferred_adamw  only the rows of a batch are touched, and each first catches up on the k updates it
                missed (`row_coast`), so that it stands where dense AdamW would have brought it.

Rows of a table that is `FROZEN` are read as they are, and never updated.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from stem_jax.kernels.row_passes import can_pass, read_rows, update_rows
from stem_jax.parts import part
from stem_jax.tables.coast_groups import group_edges
from stem_jax.tables.row_coast import Coast, RowBlock, coast_of, coasted
from stem_jax.tables.spec import TableSpec, TableState
from stem_jax.tables.update_history import UpdateHistory


def adamw(spec: TableSpec, block: RowBlock, gradient, learning_rate, step) -> RowBlock:
    """One AdamW update, element by element.

    Args:
        gradient: float32, of the shape of the rows.
        learning_rate: scalar, of this update.
        step: scalar int32, the number of this update, from 1.
    """
    return _adamw(spec, block, gradient, learning_rate, *_left(spec, step))


def _adamw(spec: TableSpec, block: RowBlock, gradient, learning_rate, left_mu, left_nu) -> RowBlock:
    mu = spec.beta1 * block.mu + (1 - spec.beta1) * gradient
    nu = spec.beta2 * block.nu + (1 - spec.beta2) * gradient * gradient
    corrected = mu / left_mu
    scale = jnp.sqrt(nu / left_nu) + spec.epsilon
    decayed = block.rows * (1 - learning_rate * spec.weight_decay)
    return RowBlock(decayed - learning_rate * corrected / scale, mu, nu)


def _left(spec: TableSpec, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What of both moments an update, from 1, leaves to gradients: 1 - beta^step."""
    step = step.astype(jnp.float32)
    return 1 - spec.beta1**step, 1 - spec.beta2**step


@dataclasses.dataclass(frozen=True)
class RowOptimizer:
    """Reads and updates the rows of one shard; `spec.optimizer` names the rule.

    Row numbers count within the shard; those past its end are padding, read as any row and written
    nowhere.

    edges: of the groups of terms, see `catch_up`. piece: rows of one vector that are worked on at a
    time; None for all rows and vectors. A few fit the fast memory of a TPU with all that is made of
    them, so each is read once and written once. passes: rows are computed on by the kernel of
    `row_passes` where it can; no bit depends on how many they are then.
    """

    spec: TableSpec
    edges: tuple[int, ...] | None = None
    piece: int | None = None
    passes: bool = False

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
        if self._passes(state):
            coast = self._coast(state, rows_O, step, history)

            def now(rows, mu, nu, numbers):
                return self._now(RowBlock(rows, mu, nu), self._coast_in(numbers)).rows

            places_O = jnp.minimum(rows_O, state.last_step.shape[0] - 1)
            arrays = state.rows, state.mu, state.nu
            return read_rows(now, arrays, places_O, _columns(coast, len(rows_O)), dtype)
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
        if self._passes(state):
            coast = self._coast(state, rows_O, step, history)
            scalars = scale, rate, *_left(self.spec, step + 1)

            def updated(rows, mu, nu, gradient, numbers):
                factor, *others = numbers[-len(scalars) :]
                block = self._now(RowBlock(rows, mu, nu), self._coast_in(numbers))
                block = _adamw(self.spec, block, gradient * factor, *others)
                return block.rows, block.mu, block.nu

            passed = update_rows(
                updated,
                arrays,
                jnp.minimum(rows_O, size - 1),
                touched < size,
                _columns(coast, len(rows_O), *scalars),
                gradient_SxOxF,
            )
            return _state(passed, last_step)
        if self._whole(rows_O):
            block = self.read(state, rows_O, step, history)
            block = adamw(self.spec, block, gradient_SxOxF * scale, rate, step + 1)
            written = (block.rows, block.mu, block.nu)
            moved = (
                whole.at[:, touched].set(part, mode="drop", unique_indices=True)
                for whole, part in zip(arrays, written, strict=True)
            )
            return _state(moved, last_step)
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

        return _state(self._by_piece(one_piece, arrays, len(rows_O)), last_step)

    def _whole(self, rows_O: jax.Array) -> bool:
        return self.piece is None or len(rows_O) <= self.piece

    def _coast(self, state: TableState, rows_O, step, history) -> Coast | None:
        if self.spec.optimizer != "deferred_adamw":
            return None
        rows_O = jnp.minimum(rows_O, state.last_step.shape[0] - 1)
        return coast_of(self.spec, state.last_step[rows_O], step, history, self.edges)

    def _passes(self, state: TableState) -> bool:
        # Of a coast three besides the groups', of an update four.
        return self.passes and can_pass(state.rows.shape[2], 2 * self._groups + 3 + 4)

    @property
    def _groups(self) -> int:
        if self.spec.optimizer != "deferred_adamw":
            return 0
        return len(self.edges or group_edges(self.spec.beta1, self.spec.beta2))

    def _coast_in(self, numbers: list[jax.Array]) -> Coast | None:
        """The coast that `_columns` made numbers of."""
        groups = self._groups
        if not groups:
            return None
        weight, over, rest = numbers[:groups], numbers[groups : 2 * groups], numbers[2 * groups :]
        # Of one piece the groups are a list, of columns.
        groups_of: Any = (weight, over)
        return Coast(*groups_of, *rest[:3])

    def _now(self, block: RowBlock, coast: Coast | None) -> RowBlock:
        return block if coast is None else coasted(self.spec, block, coast)

    def _piece_of(self, arrays, rows_O, vector, first):
        """A piece's block [1, piece, F], and what cuts its part out of numbers by row."""

        def part_of(numbers):
            axis = max(numbers.ndim - 2, 0)
            return jax.lax.dynamic_slice_in_dim(numbers, first, self.piece, axis)

        places = part_of(rows_O)
        return RowBlock(*(array[vector, places][None] for array in arrays)), part_of

    def _by_piece(self, one_piece, found, number: int):
        """`found` after `one_piece(found, vector, first, new)` of each vector and piece of rows.

        new: [piece], whether a row was in no piece before this one.
        """
        piece = self.piece
        assert piece is not None
        pieces = -(-number // piece)

        def one(turn, found):
            vector, first = turn // pieces, turn % pieces * piece
            begin = jnp.minimum(first, number - piece)
            return one_piece(found, vector, begin, begin + jnp.arange(piece) >= first)

        return jax.lax.fori_loop(0, self.spec.vectors * pieces, one, found)


def _state(arrays: Iterable[jax.Array], last_step: jax.Array) -> TableState:
    rows, mu, nu = arrays
    return TableState(rows, mu, nu, last_step)


def _columns(coast: Coast | None, number: int, *scalars) -> jax.Array:
    """The coast's numbers, then some that all rows share: [O, K] float32."""
    columns = [jnp.full((number, 1), scalar, jnp.float32) for scalar in scalars]
    if coast is not None:
        columns = [*coast.weight, *coast.over, coast.decay, coast.mu, coast.nu, *columns]
    if not columns:
        return jnp.zeros((number, 1), jnp.float32)
    return jnp.concatenate(columns, axis=1)
