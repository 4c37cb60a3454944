"""Where a row stands after updates that it missed: what it has coasted on its own momentum.

A row last updated at s and read at t = s + k has coasted on its first moment m under its second
moment v, both shrinking without a gradient:

    m <- b1^k m,  v <- b2^k v
    p <- p * prod(1 - lr_i wd) - sum_{j=1..k} c_j m / (a_j sqrt(v) + eps)
    c_j = lr_{s+j} * prod_{i=s+j+1..t}(1 - lr_i wd) * b1^j / (1 - b1^{s+j})
    a_j = sqrt(b2^j / (1 - b2^{s+j}))

With rowwise moments there is no m: v <- b2^k v and p <- p * prod(1 - lr_i wd), exactly.

c_j and a_j are numbers per row. The terms are cut into a few groups; a group with the weight
C = sum c_j gets the one a = C / sum(c_j / a_j), exact for eps -> 0. That takes one square root
and one division per group and element, whatever k is.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from stem_jax.tables.coast_groups import group_edges, num_terms
from stem_jax.tables.spec import ROWWISE, TableSpec
from stem_jax.tables.update_history import UpdateHistory

# Of what a table does not have.
_NONE: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowBlock:
    """Rows [S, O, F] with their moments, all float32, as of one update.

    mu, nu: [S, O, F]. v: [S, O, 1]. What a table does not have is None.
    """

    rows: jax.Array
    mu: jax.Array = _NONE
    nu: jax.Array = _NONE
    v: jax.Array = _NONE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coast:
    """What catching up does to rows, as columns [O, 1]; of the G groups of terms, [G, O, 1].

    weight, over: C and a of a group, see above. decay, mu, nu: factors of the row and its moments.
    Of rowwise moments there are decay and nu alone: without a first moment nothing coasts.
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
    if spec.moments == ROWWISE:
        decay_O = history.decay_between(last_step_O, step)
        nu_O = spec.beta2 ** (step - last_step_O).astype(jnp.float32)
        return Coast(_NONE, _NONE, decay_O[:, None], _NONE, nu_O[:, None])
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
    coast = Coast(
        weight=jnp.stack(weights),
        over=jnp.stack(overs),
        decay=history.decay_between(last_step_O, step),
        mu=spec.beta1**missed,
        nu=spec.beta2**missed,
    )
    return jax.tree.map(lambda numbers: numbers[..., None], coast)


def coasted(spec: TableSpec, block: RowBlock, coast: Coast) -> RowBlock:
    """Rows [.., O, F] after their coast, without gradients."""
    if spec.moments == ROWWISE:
        return RowBlock(block.rows * coast.decay, v=block.v * coast.nu)
    root = jnp.sqrt(block.nu)
    moved = jnp.zeros_like(block.rows)
    for weight_Ox1, a_Ox1 in zip(coast.weight, coast.over, strict=True):
        moved += weight_Ox1 / (a_Ox1 * root + spec.epsilon)
    return RowBlock(
        rows=block.rows * coast.decay - moved * block.mu,
        mu=block.mu * coast.mu,
        nu=block.nu * coast.nu,
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
