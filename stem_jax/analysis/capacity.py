"""How many parameters of the tables a context touches, on real text.

Each distinct token of a context brings its row into play: S vectors of width F. A dense model has
S D F parameters in the up projections of those layers, whatever the context (STEM, arXiv
2601.10639, on capacity that grows with the context).
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from stem_jax.config import ModelConfig

# Tokens of the text that windows are cut from.
TEXT_TOKENS = 1 << 20
_WINDOWS = 64


def distinct_tokens(ids_n: np.ndarray) -> int:
    """How many different tokens there are."""
    return len(np.unique(ids_n))


def touched_parameters(model: ModelConfig, distinct: int) -> int:
    """Table parameters that a context with so many distinct tokens touches: S F of each."""
    return distinct * model.num_stem_layers * model.ffn_dim


@dataclasses.dataclass(frozen=True)
class ContextCapacity:
    """Over windows of one length.

    length: tokens. windows: so many, evenly spaced. distinct: mean number of distinct tokens.
    parameters, low, high: of the tables that a window touches: mean, fewest, most.
    """

    length: int
    windows: int
    distinct: float
    parameters: float
    low: int
    high: int


@dataclasses.dataclass(frozen=True)
class Capacity:
    """Over context lengths. replaced: parameters of the up projections that a dense model has in
    place of the tables, which every context touches. table: of all rows. context: trained on.
    """

    lengths: list[ContextCapacity]
    replaced: int
    table: int
    context: int

    def overtakes(self) -> int | None:
        """The first length that touches more than a dense model has instead; None for none."""
        return next((c.length for c in self.lengths if c.parameters > self.replaced), None)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self) | {"overtakes": self.overtakes()}


def measure_capacity(
    model: ModelConfig,
    ids_n: np.ndarray,
    context: int,
    bar: Callable[[Iterable], Iterable] = iter,
) -> Capacity:
    """Counts over powers of two up to the length of the text.

    Args:
        ids_n: the text, documents one after the other.
        context: that the model was trained on.
        bar: draws the progress of an iterable.
    """
    lengths = [1 << power for power in range(len(ids_n).bit_length()) if 1 << power <= len(ids_n)]
    found = [_over_windows(model, ids_n, length) for length in bar(lengths)]
    S, F = model.num_stem_layers, model.ffn_dim
    return Capacity(found, S * model.embed_dim * F, model.vocab_size * S * F, context)


def _over_windows(model: ModelConfig, ids_n: np.ndarray, length: int) -> ContextCapacity:
    number = min(_WINDOWS, len(ids_n) // length)
    starts = np.linspace(0, len(ids_n) - length, number).astype(int)
    distinct = [distinct_tokens(ids_n[at : at + length]) for at in starts]
    touched = [touched_parameters(model, tokens) for tokens in distinct]
    return ContextCapacity(
        length=length,
        windows=number,
        distinct=float(np.mean(distinct)),
        parameters=float(np.mean(touched)),
        low=min(touched),
        high=max(touched),
    )
