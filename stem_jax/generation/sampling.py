"""Choosing the next token: greedy, or drawn at a temperature among the top k, within the top p."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from stem_jax.errors import InputError

# On the device these are float32 and int32. Below its least normal number a share is zero, which
# keeps no token; logits divided by less than the first temperature may be infinite.
_LEAST_TOP_P = 1.2e-38
_TEMPERATURES = (1e-30, 1e30)
_MOST_TOKENS = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the three combine, in this order.

    temperature: divides the logits; 0 is greedy. top_k: only the k likeliest tokens; 0 is all.
    top_p: only the fewest likeliest tokens whose probabilities reach p; 1 is all.

    Raises:
        InputError: a value outside its range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95

    def __post_init__(self):
        coldest, hottest = _TEMPERATURES
        if self.temperature != 0 and not coldest <= self.temperature <= hottest:
            raise InputError(
                f"temperature={self.temperature} must be 0 (greedy) or from {coldest} to {hottest}"
            )
        if not 0 <= self.top_k <= _MOST_TOKENS:
            raise InputError(
                f"top_k={self.top_k} must be from 0 (all tokens) to {_MOST_TOKENS}; 0 for all"
            )
        if not _LEAST_TOP_P <= self.top_p <= 1:
            raise InputError(
                f"top_p={self.top_p} must be at least {_LEAST_TOP_P} and at most 1 (all tokens); "
                "for the likeliest alone take temperature 0"
            )

    def scalars(self) -> tuple[np.float32, np.int32, np.float32]:
        """The values as arguments of a compiled program, of which one serves all settings."""
        return np.float32(self.temperature), np.int32(self.top_k), np.float32(self.top_p)


def sample(logits_BxV, seeds_B, step, temperature, top_k, top_p) -> jax.Array:
    """The next token of each sequence, [B] int32; traced inside the caller's jit.

    Args:
        logits_BxV: float32.
        seeds_B: uint32; a sequence's draw depends on its own seed, step, settings and logits alone.
        step: int32, number of tokens drawn before; one of each sequence [B], or one of all.
        temperature, top_k, top_p: see `Sampling`; of each sequence [B], or of all.
    """
    steps_B, temperature_B = _of_each(step, seeds_B), _of_each(temperature, seeds_B)
    greedy_B = jnp.argmax(logits_BxV, axis=-1)

    def draw():
        divisor_B = jnp.where(temperature_B > 0, temperature_B, 1)
        kept_BxV = keep_likeliest(logits_BxV / divisor_B[:, None], top_k, top_p)
        keys_B = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(
            seeds_B, steps_B
        )
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, kept_BxV)
        return jnp.where(temperature_B > 0, drawn_B, greedy_B)

    token_B = jax.lax.cond(jnp.any(temperature_B > 0), draw, lambda: greedy_B)
    return token_B.astype(jnp.int32)


def keep_likeliest(logits_BxV: jax.Array, top_k, top_p) -> jax.Array:
    """Float32 logits with all tokens outside the top k, then outside the top p, at -inf.

    Of tied tokens the lower ids come first, so exactly k are kept; the likeliest always is. Both
    are of each sequence [B], or of all.
    """
    k_B, p_B = _of_each(top_k, logits_BxV), _of_each(top_p, logits_BxV)

    def within_k():
        target_Bx1 = k_B.astype(jnp.float32)[:, None]
        few_BxV = _fewest(logits_BxV, jnp.ones_like(logits_BxV), target_Bx1)
        return jnp.where(k_B[:, None] > 0, few_BxV, logits_BxV)

    def within_p():
        few_BxV = _fewest(kept_BxV, jax.nn.softmax(kept_BxV, axis=-1), p_B[:, None])
        return jnp.where(p_B[:, None] < 1, few_BxV, kept_BxV)

    kept_BxV = jax.lax.cond(jnp.any(k_B > 0), within_k, lambda: logits_BxV)
    return jax.lax.cond(jnp.any(p_B < 1), within_p, lambda: kept_BxV)


def _of_each(setting, sequences) -> jax.Array:
    return jnp.broadcast_to(setting, (len(sequences),))


def _fewest(logits_BxV: jax.Array, weights_BxV: jax.Array, target) -> jax.Array:
    """The logits, -inf outside the fewest largest ones whose weights sum to the target.

    Finds the smallest logit of the set bit by bit, 32 sums in all. XLA's sort does the same at 8
    times the cost on a CPU (50 ms for 128,256 tokens).
    """
    # Minus zero has other bits than zero, to which it is equal.
    bits_BxV = jax.lax.bitcast_convert_type(jnp.where(logits_BxV == 0, 0, logits_BxV), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    # In this order unsigned integers compare as the floats do.
    order_BxV = jnp.where(bits_BxV >= sign, ~bits_BxV, bits_BxV | sign)

    def weight_of(mask_BxV):
        return jnp.sum(jnp.where(mask_BxV, weights_BxV, 0), axis=-1, keepdims=True)

    def next_bit(index, bound_Bx1):
        higher_Bx1 = bound_Bx1 | (sign >> index)
        return jnp.where(weight_of(order_BxV >= higher_Bx1) >= target, higher_Bx1, bound_Bx1)

    bound_Bx1 = jnp.zeros((logits_BxV.shape[0], 1), jnp.uint32)
    bound_Bx1 = jax.lax.fori_loop(0, 32, next_bit, bound_Bx1)
    above_BxV, tied_BxV = order_BxV > bound_Bx1, order_BxV == bound_Bx1
    tied_weight_BxV = jnp.where(tied_BxV, weights_BxV, 0)
    before_BxV = jnp.cumsum(tied_weight_BxV, axis=-1) - tied_weight_BxV + weight_of(above_BxV)
    return jnp.where(above_BxV | (tied_BxV & (before_BxV < target)), logits_BxV, -jnp.inf)
