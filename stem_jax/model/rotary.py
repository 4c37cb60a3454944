"""Rotary position encoding, and its two ways to contexts longer than the trained one."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from stem_jax.config import ModelConfig

# Llama 3 keeps frequencies that turn at least 4 times within the trained context, and stretches
# those that turn less than once (Llama 3.1 model card; the constants of all its releases).
_LLAMA3_KEPT_TURNS, _LLAMA3_STRETCHED_TURNS = 4.0, 1.0
# YaRN's alpha and beta for Llama models (arXiv 2309.00071, section 3.2), in turns as well.
_YARN_KEPT_TURNS, _YARN_STRETCHED_TURNS = 32.0, 1.0


def rotary_angles(positions_BxL: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of position * frequency, each [B, L, head_dim / 2], float32.

    With `model.rope_scaling=yarn` both are multiplied by its attention temperature.
    """
    angles = positions_BxL[..., None].astype(jnp.float32) * frequencies(config)
    scale = attention_scale(config)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each pair of dimensions, float32 [head_dim / 2].

    theta^(-2i / head_dim); scaled ones are divided by `rope_factor` where they turn slowly.
    """
    pairs = np.arange(0, config.head_dim, 2, dtype=np.float32)
    plain = (np.float32(config.rope_theta) ** (-pairs / config.head_dim)).astype(np.float32)
    if config.rope_scaling == "none":
        return plain
    kept = (_kept_llama3 if config.rope_scaling == "llama3" else _kept_yarn)(config, plain)
    return (plain * kept + plain / config.rope_factor * (1 - kept)).astype(np.float32)


def attention_scale(config: ModelConfig) -> float:
    """What queries and keys are multiplied by; 1 but for YaRN (its eq. 15, as 0.1 ln(s) + 1)."""
    if config.rope_scaling != "yarn" or config.rope_factor <= 1:
        return 1.0
    return 0.1 * math.log(config.rope_factor) + 1.0


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the pairs (x[i], x[i + Dh / 2]) of [B, L, heads, Dh] by their angles, in float32."""
    cos, sin = (a[:, :, None, :] for a in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def halves_first(kernel, heads: int):
    """Columns [D, heads * Dh] of a projection whose pairs are (2i, 2i + 1), for `rotate`."""
    return _turned(kernel, (heads, -1, 2))


def pairs_first(kernel, heads: int):
    """The inverse of `halves_first`. Both take arrays of numpy and of jax."""
    return _turned(kernel, (heads, 2, -1))


def _turned(kernel, columns: tuple[int, int, int]):
    """The columns as [heads, a, b], with a and b swapped."""
    parts = kernel.reshape(*kernel.shape[:-1], *columns)
    return parts.swapaxes(-1, -2).reshape(kernel.shape)


def _kept_llama3(config: ModelConfig, plain: np.ndarray) -> np.ndarray:
    """Share of each frequency that stays as trained, linear in the number of its turns."""
    assert config.rope_original_len is not None
    turns = config.rope_original_len * plain / (2 * math.pi)
    low, high = _LLAMA3_STRETCHED_TURNS, _LLAMA3_KEPT_TURNS
    return np.clip((turns - low) / (high - low), 0, 1)


def _kept_yarn(config: ModelConfig, plain: np.ndarray) -> np.ndarray:
    """The same, linear in the index of the pair between the two bounds."""
    original = config.rope_original_len
    assert original is not None

    def index_of(turns: float) -> float:
        # The (fractional) index of the pair that turns so often within the trained context.
        ratio = original / (turns * 2 * math.pi)
        return config.head_dim * math.log(ratio) / (2 * math.log(config.rope_theta))

    first = max(math.floor(index_of(_YARN_KEPT_TURNS)), 0)
    last = min(math.ceil(index_of(_YARN_STRETCHED_TURNS)), config.head_dim - 1)
    index = np.arange(len(plain), dtype=np.float32)
    # Reference implementations widen an empty ramp a little.
    return 1 - np.clip((index - first) / max(last - first, 0.001), 0, 1)
