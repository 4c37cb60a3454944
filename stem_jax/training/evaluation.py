"""Validation: cross-entropy and bits per byte on held-out documents."""

import dataclasses
import math
from collections.abc import Iterable

import jax


@dataclasses.dataclass(frozen=True)
class Validation:
    """Result on the held-out documents. loss: nats per scored token. tokens: scored tokens."""

    loss: float
    bits_per_byte: float
    tokens: int

    def metrics(self) -> dict[str, float]:
        """As a metrics record."""
        return {
            "eval/loss": self.loss,
            "eval/bits_per_byte": self.bits_per_byte,
            "eval/tokens": self.tokens,
        }


def summarize(sums: Iterable[tuple[jax.Array, jax.Array]], num_bytes: int) -> Validation:
    """Adds up (nats, scored tokens) over batches.

    Args:
        num_bytes: UTF-8 bytes of the text that was scored.
    """
    nats, tokens = zip(*((float(total), int(count)) for total, count in list(sums)), strict=True)
    total = math.fsum(nats)
    return Validation(total / sum(tokens), total / math.log(2) / num_bytes, sum(tokens))
