"""Validation: cross-entropy and bits per byte on held-out documents."""

import dataclasses
import math
from collections.abc import Iterable

import jax

from stem_jax.data.coverage import left_out_note


@dataclasses.dataclass(frozen=True)
class Validation:
    """Result on the held-out documents.

    loss: nats per scored token. tokens: scored tokens. left_out: share of the text's bytes that no
    token stands for.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    left_out: float = 0.0

    @property
    def caution(self) -> str:
        """What stands behind bits per byte where they do not speak of the whole text; else ""."""
        note = left_out_note(self.left_out)
        return f" ({note})" if note else ""

    def metrics(self) -> dict[str, float]:
        """As a metrics record."""
        return {
            "eval/loss": self.loss,
            "eval/bits_per_byte": self.bits_per_byte,
            "eval/tokens": self.tokens,
        }


def summarize(
    sums: Iterable[tuple[jax.Array, jax.Array]], num_bytes: int, left_out: float = 0.0
) -> Validation:
    """Adds up (nats, scored tokens) over batches.

    Args:
        num_bytes: UTF-8 bytes of the text that was scored.
        left_out: share of them that no token stands for.
    """
    nats, tokens = zip(*((float(total), int(count)) for total, count in list(sums)), strict=True)
    total = math.fsum(nats)
    bits = total / math.log(2)
    return Validation(total / sum(tokens), bits / num_bytes, sum(tokens), left_out)
