"""Learning rates and decay of all updates of a run, in the form that rows look back with."""

import dataclasses

import jax
import numpy as np

from stem_jax.errors import InputError
from stem_jax.tables.spec import TableSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UpdateHistory:
    """The updates of a run as rows see them; update i (from 1) is at index i - 1.

    rates: [T] float32 learning rates, the multiplier included.
    log_decay, log_decay_rest: [T + 1] float32, together the sum over the first i updates of
        log(1 - rate * weight_decay), in two parts because differences of long sums are taken.
    """

    rates: jax.Array | np.ndarray
    log_decay: jax.Array | np.ndarray
    log_decay_rest: jax.Array | np.ndarray

    def decay_between(self, start: jax.Array, end: jax.Array) -> jax.Array:
        """Product of (1 - rate * weight_decay) over the updates start + 1 .. end."""
        whole = self.log_decay[end] - self.log_decay[start]
        rest = self.log_decay_rest[end] - self.log_decay_rest[start]
        return jax.numpy.exp(whole + rest)


def make_history(spec: TableSpec, learning_rates: np.ndarray) -> UpdateHistory:
    """The history of a run from the backbone's learning rates [T].

    Raises:
        InputError: a rate at which weight decay would turn the sign of a row.
    """
    rates = np.asarray(learning_rates, np.float32) * np.float32(spec.lr_multiplier)
    shrink = rates.astype(np.float64) * spec.weight_decay
    if shrink.size and shrink.max() >= 1:
        raise InputError(
            f"learning rate {rates.max():g} of the tables times weight decay {spec.weight_decay:g} "
            "must be less than 1; lower tables.lr_multiplier or tables.weight_decay"
        )
    total = np.concatenate([[0.0], np.cumsum(np.log1p(-shrink))])
    whole = total.astype(np.float32)
    return UpdateHistory(rates, whole, (total - whole).astype(np.float32))
