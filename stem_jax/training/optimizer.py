"""The backbone's optimizers, through optax: AdamW as published, and Muon for the blocks' matrices.

`optimizer.name` says which. Neither knows of the learning rate, which the train step passes by
`apply_update`, nor of tables, whose rows have an optimizer of their own (`tables.row_optimizer`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from stem_jax.config import OptimizerConfig
from stem_jax.model.layer_plan import LAYERS

Axes = tuple[str, ...]

# The root mean square of a matrix's update by Muon: that of AdamW's in practice, so that both go
# by the same learning rate (arXiv 2502.16982).
_MUON_RMS = 0.2


def make_optimizer(
    config: OptimizerConfig,
    axes_of: Callable[[str], Axes],
    trains: Callable[[str], bool] = lambda name: True,
) -> optax.GradientTransformation:
    """The configured optimizer; of what is frozen it keeps no moments.

    Args:
        axes_of: the logical axes of a parameter by its name, see `ModelDef.axes_of`.
        trains: whether a parameter trains with the backbone. Updates are of those that do alone;
            what it begins with may have others.
    """
    if not config.trains_backbone:
        # A count, which a checkpoint has something to hold by.
        nothing = optax.scale_by_adam()
        return optax.masked(nothing, lambda params: dict.fromkeys(params, False))

    def decays(params):
        # Norm scales are the only vectors; the published recipe decays them too.
        return {name: config.decay_mask == "all" or _is_matrix(axes_of(name)) for name in params}

    optimizer = optax.chain(
        _DIRECTIONS[config.name](config, axes_of),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
    )

    def init(params):
        return optimizer.init({name: p for name, p in params.items() if trains(name)})

    return optax.GradientTransformation(init, optimizer.update)


def _adam(config: OptimizerConfig, axes_of: Callable[[str], Axes] | None = None):
    del axes_of
    return optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)


def _muon(config: OptimizerConfig, axes_of: Callable[[str], Axes]) -> optax.GradientTransformation:
    """Muon's direction for the blocks' matrices, Adam's for all else.

    Not `optax.contrib.muon`, whose Adam looks ahead (Nesterov) where AdamW's does not.
    """

    def labels(params):
        return {name: "muon" if _is_of_blocks(axes_of(name)) else "adam" for name in params}

    def numbers(updates):
        # The last two axes are a matrix; those before count layers or experts, each its own.
        return jax.tree.map(
            lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), updates
        )

    muon = optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=numbers),
        optax.stateless(lambda updates, _: jax.tree.map(_with_consistent_rms, updates)),
    )
    return optax.partition({"adam": _adam(config), "muon": muon}, labels)


# By `optimizer.name`.
_DIRECTIONS = {"adamw": _adam, "muon": _muon}


def _with_consistent_rms(update: jax.Array) -> jax.Array:
    """An orthogonal matrix [..., M, N], or several, with entries of the same size in all shapes."""
    return update * (_MUON_RMS * max(update.shape[-2:]) ** 0.5)


def _is_matrix(axes: Axes) -> bool:
    """Whether a parameter of each layer is one, and not a vector, or one for each tap."""
    return sum(axis not in (LAYERS, "taps") for axis in axes) > 1


def _is_of_blocks(axes: Axes) -> bool:
    """Whether it is a matrix that maps vectors within blocks: no embedding and no head."""
    return _is_matrix(axes) and "vocab" not in axes


def apply_update(optimizer, params, opt_state, gradients, learning_rate):
    """One update; returns the new parameters and optimizer state. All arrays are float32."""
    direction, opt_state = optimizer.update(gradients, opt_state, params)
    return jax.tree.map(lambda p, d: p - learning_rate * d, params, direction), opt_state


def clip_factor(norm: jax.Array, limit: float) -> jax.Array:
    """What a gradient of this global norm is multiplied by, torch.nn.utils.clip_grad_norm_."""
    return jnp.minimum(1.0, limit / (norm + 1e-6))
