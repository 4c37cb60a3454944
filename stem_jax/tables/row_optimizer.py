"""The row optimizer: one definition of the update, for every optimizer and every placement.

The rule is AdamW's, or that of one moment for each vector (`row_rules`). Three optimizers share it:

dense_adamw     every row moves every step, as in the official code; the oracle for the others.
lazy_adamw      only the rows of a batch move; the others neither decay nor coast on momentum, so it
                is another optimizer.
deferred_adamw  only the rows of a batch are touched, and each first catches up on the k updates it
                missed (`row_coast`), so that it stands where dense AdamW would have brought it.

Rows of a table that is `FROZEN` are read as they are, and never updated. Whatever the format that
rows lie in, they are computed on in float32, and rounded once, where they are written (`rounding`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from stem_jax.kernels.row_passes import can_pass, read_rows, update_rows
from stem_jax.parts import part
from stem_jax.tables.coast_groups import group_edges
from stem_jax.tables.rounding import rounded, write_key
from stem_jax.tables.row_coast import Coast, RowBlock, coast_of, coasted
from stem_jax.tables.row_rules import left, mean_squares, updated
from stem_jax.tables.spec import ADAMW, ROWWISE, TableSpec, TableState
from stem_jax.tables.update_history import UpdateHistory


@dataclasses.dataclass(frozen=True)
class RowOptimizer:
    """Reads and updates the rows of one shard; `spec.optimizer` names the rule.

    Places of rows count within the shard; those past its end are padding, read as any row and
    written nowhere.

    edges: of the groups of terms, see `catch_up`. piece: rows of one vector that are worked on at a
    time; None for all rows and vectors. A few fit the fast memory of a TPU with all that is made of
    them, so each is read once and written once. passes: rows are computed on by the kernel of
    `row_passes` where it can; no bit depends on how many they are then. column_shards: devices
    along the axis `tensor`, each with its columns of every row; more than one inside shard_map.
    """

    spec: TableSpec
    edges: tuple[int, ...] | None = None
    piece: int | None = None
    passes: bool = False
    column_shards: int = 1

    @part("row_optimizer")
    def read(self, state: TableState, rows_O, step, history: UpdateHistory) -> RowBlock:
        """Rows as the next forward sees them, after `step` completed updates."""
        # Padding reads the last row.
        rows_O = jnp.minimum(rows_O, state.rows.shape[1] - 1)
        block = self._block(self._arrays(state), (slice(None), rows_O))
        return self._now(block, self._coast(state, rows_O, step, history))

    @part("row_optimizer")
    def read_as(self, state: TableState, rows_O, step, history: UpdateHistory, dtype) -> jax.Array:
        """The rows alone of `read`, [S, O, F] in another dtype."""
        if self._passes(state):
            coast = self._coast(state, rows_O, step, history)

            def now(rows, mu, nu, numbers):
                return self._now(RowBlock(rows, mu, nu), self._coast_in(numbers)).rows

            places_O = jnp.minimum(rows_O, state.rows.shape[1] - 1)
            arrays = self._arrays(state)
            return read_rows(now, arrays, places_O, _columns(coast, len(rows_O)), dtype)
        if self._whole(rows_O):
            return self.read(state, rows_O, step, history).rows.astype(dtype)
        rows_O = jnp.minimum(rows_O, state.rows.shape[1] - 1)
        coast, arrays = self._coast(state, rows_O, step, history), self._arrays(state)

        def one_piece(found, vector, first, _):
            block, part_of = self._piece_of(arrays, rows_O, vector, first)
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
        numbers_O: jax.Array | None = None,
    ) -> TableState:
        """Applies update `step + 1`.

        Args:
            gradient_SxOxF: summed gradients.
            step: scalar int32, updates completed before this one.
            keep: scalar bool; False leaves every row where it is.
            scale: scalar that the gradients are multiplied with.
            numbers_O: of the rows in the whole table; None: as their places.
        """
        rate = history.rates[step]
        size = state.rows.shape[1]
        numbers_O = rows_O if numbers_O is None else numbers_O
        # Padding, and everything when nothing is kept, goes past the end, to places all distinct.
        outside_O = size + jnp.arange(rows_O.shape[0])
        touched = jnp.where(keep & (rows_O < size), rows_O, outside_O)
        last_step = state.last_step.at[touched].set(step + 1, mode="drop", unique_indices=True)
        names, arrays = [field.name for field in self.spec.moved_fields], self._arrays(state)

        def moved(into: Sequence[jax.Array]) -> TableState:
            return TableState(**dict(zip(names, into, strict=True)), last_step=last_step)

        if self.spec.optimizer == "dense_adamw":
            assert self.spec.row_format == "float32", "nobody has given all rows their numbers"
            gradient = jnp.zeros_like(state.rows)
            gradient = gradient.at[:, touched].set(
                gradient_SxOxF * scale, mode="drop", unique_indices=True
            )
            block = self._block(arrays, (slice(None),))
            new = self._written(self._updated(block, gradient, rate, step), None, numbers_O, step)
            return moved(
                [jnp.where(keep, now, before) for now, before in zip(new, arrays, strict=True)]
            )
        if self._passes(state):
            coast = self._coast(state, rows_O, step, history)
            scalars = scale, rate, *left(self.spec, step + 1)

            def passing(rows, mu, nu, gradient, numbers):
                factor, *others = numbers[-len(scalars) :]
                block = self._now(RowBlock(rows, mu, nu), self._coast_in(numbers))
                block = updated(self.spec, block, gradient * factor, None, *others)
                return block.rows, block.mu, block.nu

            passed = update_rows(
                passing,
                arrays,
                jnp.minimum(rows_O, size - 1),
                touched < size,
                _columns(coast, len(rows_O), *scalars),
                gradient_SxOxF,
            )
            return moved(passed)
        if self._whole(rows_O):
            block = self.read(state, rows_O, step, history)
            block = self._updated(block, gradient_SxOxF * scale, rate, step)
            written = self._written(block, None, numbers_O, step)
            return moved(
                [
                    whole.at[:, touched].set(part, mode="drop", unique_indices=True)
                    for whole, part in zip(arrays, written, strict=True)
                ]
            )
        rows_O = jnp.minimum(rows_O, size - 1)
        coast, squares = self._coast(state, rows_O, step, history), None
        if self.spec.moments == ROWWISE:
            squares = mean_squares(gradient_SxOxF * scale, self.column_shards)

        def one_piece(arrays, vector, first, new):
            block, part_of = self._piece_of(arrays, rows_O, vector, first)

            def given(whole):
                start, sizes = (vector, first, 0), (1, self.piece, whole.shape[2])
                return jax.lax.dynamic_slice(whole, start, sizes)

            block = self._now(block, jax.tree.map(part_of, coast))
            of_piece = None if squares is None else given(squares)
            block = self._updated(block, given(gradient_SxOxF) * scale, rate, step, of_piece)
            # What the piece before has updated was read anew, and goes nowhere.
            places = jnp.where(new, part_of(touched), part_of(outside_O))
            written = self._written(block, vector, part_of(numbers_O), step)
            return tuple(
                whole.at[vector, places].set(part[0], mode="drop", unique_indices=True)
                for whole, part in zip(arrays, written, strict=True)
            )

        return moved(self._by_piece(one_piece, arrays, len(rows_O)))

    def _arrays(self, state: TableState) -> tuple[jax.Array, ...]:
        return tuple(getattr(state, field.name) for field in self.spec.moved_fields)

    def _block(self, arrays: Sequence[jax.Array], at) -> RowBlock:
        """What the arrays have there, in float32."""
        found = {}
        for field, array in zip(self.spec.moved_fields, arrays, strict=True):
            values = array[at].astype(jnp.float32)
            found[field.name] = values if "F" in field.axes else values[..., None]
        return RowBlock(**found)

    def _updated(self, block: RowBlock, gradient, rate, step, squares=None) -> RowBlock:
        """squares: of the whole rows, where the gradient is of a piece of them."""
        if squares is None and self.spec.moments == ROWWISE:
            squares = mean_squares(gradient, self.column_shards)
        return updated(self.spec, block, gradient, squares, rate, *left(self.spec, step + 1))

    def _written(self, block: RowBlock, vector, numbers_O, step) -> list[jax.Array]:
        """A block as the arrays hold it; vector: its only one, None: it has all."""
        return [
            self._rounded(getattr(block, field.name), place, vector, numbers_O, step)
            if field.dtype == "bfloat16"
            else getattr(block, field.name)[... if "F" in field.axes else (..., 0)]
            for place, field in enumerate(self.spec.moved_fields)
        ]

    def _rounded(self, values_SxOxF, field: int, vector, numbers_O, step) -> jax.Array:
        width = values_SxOxF.shape[2]
        first = jax.lax.axis_index("tensor") * width if self.column_shards > 1 else 0
        vectors_S = jnp.arange(self.spec.vectors) if vector is None else jnp.reshape(vector, 1)
        columns_SxF = vectors_S[:, None] * self.spec.width + first + jnp.arange(width)
        key = write_key(self.spec.rounding_seed, step + 1, field)
        return rounded(values_SxOxF, key, numbers_O, columns_SxF)

    def _whole(self, rows_O: jax.Array) -> bool:
        return self.piece is None or len(rows_O) <= self.piece

    def _coast(self, state: TableState, rows_O, step, history) -> Coast | None:
        if self.spec.optimizer != "deferred_adamw":
            return None
        rows_O = jnp.minimum(rows_O, state.rows.shape[1] - 1)
        return coast_of(self.spec, state.last_step[rows_O], step, history, self.edges)

    def _passes(self, state: TableState) -> bool:
        if (self.spec.row_format, self.spec.moments) != ("float32", ADAMW):
            # The kernel copies rows of float32, and sees some columns of a row at a time.
            return False
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
        return jax.tree.map(lambda x: x[None], self._block(arrays, (vector, places))), part_of

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


def _columns(coast: Coast | None, number: int, *scalars) -> jax.Array:
    """The coast's numbers, then some that all rows share: [O, K] float32."""
    columns = [jnp.full((number, 1), scalar, jnp.float32) for scalar in scalars]
    if coast is not None:
        columns = [*coast.weight, *coast.over, coast.decay, coast.mu, coast.nu, *columns]
    if not columns:
        return jnp.zeros((number, 1), jnp.float32)
    return jnp.concatenate(columns, axis=1)
