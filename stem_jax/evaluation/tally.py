"""Sums over scored tokens, and what is told of them."""

import dataclasses
import math
from collections.abc import Sequence

from stem_jax.data.tokenizer import Tokenizer
from stem_jax.generation.completion import TextStream


@dataclasses.dataclass
class Tally:
    """Sums over scored tokens. bytes: UTF-8 bytes of their text; of a share of them, a share."""

    nats: float = 0.0
    tokens: int = 0
    bytes: float = 0

    @property
    def bits_per_byte(self) -> float | None:
        """None without bytes."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None

    def record(self) -> dict[str, float | int | None]:
        """Loss in nats per token, perplexity per token and bits per byte; None where undefined."""
        loss = self.nats / self.tokens if self.tokens else None
        return {
            "loss": loss,
            "perplexity": None if loss is None else math.exp(min(loss, 700.0)),
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }


def number(value: float | None) -> str:
    """A figure of a table."""
    return "-" if value is None else f"{value:,.4f}" if value < 1e4 else f"{value:.3e}"


def token_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """UTF-8 bytes of the text of each id; a character of several counts with its last one."""
    stream = TextStream(tokenizer)
    return [len(stream.push(token).encode()) for token in ids]
