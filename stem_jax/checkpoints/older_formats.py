"""What checkpoints of older formats hold otherwise, and how it becomes what a model reads now.

Format 2: rotary positions turned adjacent dimensions of a head, (2i, 2i + 1); since format 3 they
turn (i, i + Dh / 2). The columns of the query and key projections, and their optimizer moments,
follow that order within each head.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from stem_jax.config import ModelConfig
from stem_jax.model.rotary import halves_first

# The first whose rotary positions turn halves of a head.
_HALVES = 3


def current_tree(tree: Any, version: int, model: ModelConfig) -> Any:
    """Parameters or an optimizer's state, as a checkpoint of a format holds them, in today's order.

    Args:
        tree: jax.Arrays, of which those of a parameter have its dotted name as their last key. They
            stay in their places; those that change are donated.
        version: format of the checkpoint.
        model: whose parameters they are.
    """

    def now(path, value: jax.Array) -> jax.Array:
        heads = _rotated_heads(getattr(path[-1], "key", ""), model)
        return _program(heads, value.sharding)(value) if version < _HALVES and heads else value

    return jax.tree_util.tree_map_with_path(now, tree)


def current_array(name: str, value: np.ndarray, version: int, model: ModelConfig) -> np.ndarray:
    """One parameter, by its dotted name, likewise."""
    heads = _rotated_heads(name, model)
    return halves_first(value, heads) if version < _HALVES and heads else value


@functools.cache
def _program(heads: int, sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    """Without communication: `tensor` divides whole heads, or nothing."""
    order = functools.partial(halves_first, heads=heads)
    return jax.jit(order, donate_argnums=0, out_shardings=sharding)


def _rotated_heads(name: str, model: ModelConfig) -> int:
    """How many heads of a parameter's columns are rotated; 0: it has no such columns."""
    if name.endswith(".attention.q_proj.kernel"):
        return model.num_heads
    return model.num_kv_heads if name.endswith(".attention.k_proj.kernel") else 0
