"""The backbone's optimizer: AdamW as published, through optax."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from stem_jax.config import OptimizerConfig
from stem_jax.model.layer_plan import LAYERS

Axes = tuple[str, ...]


def make_optimizer(
    config: OptimizerConfig, axes_of: Callable[[str], Axes]
) -> optax.GradientTransformation:
    """AdamW without the learning rate, which the train step passes by `apply_update`.

    Args:
        axes_of: the logical axes of a parameter by its name, see `ModelDef.axes_of`.
    """

    def decays(params):
        # Norm scales are the only vectors; the published recipe decays them too.
        return {name: config.decay_mask == "all" or _is_matrix(axes_of(name)) for name in params}

    return optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
    )


def _is_matrix(axes: Axes) -> bool:
    """Whether a parameter of each layer is one, and not a vector."""
    return sum(axis != LAYERS for axis in axes) > 1


def apply_update(optimizer, params, opt_state, gradients, learning_rate):
    """One update; returns the new parameters and optimizer state. All arrays are float32."""
    direction, opt_state = optimizer.update(gradients, opt_state, params)
    return jax.tree.map(lambda p, d: p - learning_rate * d, params, direction), opt_state


def clip_factor(norm: jax.Array, limit: float) -> jax.Array:
    """What a gradient of this global norm is multiplied by, torch.nn.utils.clip_grad_norm_."""
    return jnp.minimum(1.0, limit / (norm + 1e-6))
