"""Compute multipliers: what dense has to spend to end where a variant ended.

Dense runs of several lengths, each with its whole schedule, give bits per byte by tokens. Between
them the bits are interpolated in the logarithm of tokens; beyond them nothing is said but that.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from stem_jax.study.measured import HEADLINE
from stem_jax.study.panels import BASELINE, Panel, Record, of_purpose, value_of

RESAMPLES = 2000
# In order: what can be said of a multiplier that lies outside the lengths of dense.
_AT_MOST, _WITHIN, _AT_LEAST = "at most", "", "at least"
_PLACE = {_AT_MOST: 0, _WITHIN: 1, _AT_LEAST: 2}
# Bits per byte of dense by tokens and seed.
Ends = Mapping[int, Mapping[int, float]]


def reach(curve: Sequence[tuple[int, float]], bits: float) -> tuple[float, str]:
    """Tokens at which dense first has so few bits per byte.

    Args:
        curve: (tokens, bits per byte), in order of tokens.

    Returns:
        tokens, and "" or what they are to the true ones: "at most" where the shortest run is below
        the bits already, "at least" where no run comes down to them.
    """
    if bits > curve[0][1]:
        return float(curve[0][0]), _AT_MOST
    if bits == curve[0][1]:
        return float(curve[0][0]), _WITHIN
    for (short, above), (long, below) in itertools.pairwise(curve):
        if below <= bits:
            share = (above - bits) / (above - below)
            return math.exp(math.log(short) + share * math.log(long / short)), _WITHIN
    return float(curve[-1][0]), _AT_LEAST


def lengths_of(records: Sequence[Record], panel: Panel) -> Ends:
    """Ends of dense on the panel's text, at its length and the others."""
    ends: dict[int, dict[int, float]] = {}
    dense = panel.cells.get(BASELINE, {})
    longer = [
        record
        for record in of_purpose(records, "length")
        if record["run"]["variant"] == BASELINE and record["run"]["text"] == panel.text
    ]
    for record in [*dense.values(), *longer]:
        if (bits := value_of(record, HEADLINE)) is not None:
            ends.setdefault(record["run"]["tokens"], {})[record["run"]["seed"]] = bits
    return {tokens: dict(sorted(ends[tokens].items())) for tokens in sorted(ends)}


def multipliers(records: Sequence[Record], panel: Panel) -> dict[str, Any]:
    """Of every variant of a panel, in two counts of FLOPs.

    Returns:
        "lengths": dense's mean by tokens; "variants": by label, for each count ("active": twice
        the active parameters for each token, "compiled": those of the compiled training step),
        {"multiplier", "bound", "low", "low_bound", "high", "high_bound", "seeds"}; bounds are "",
        "at least" or "at most". Empty where there are fewer than two lengths.
    """
    ends = lengths_of(records, panel)
    seeds = sorted(set.intersection(*(set(ends[tokens]) for tokens in ends))) if ends else []
    found: dict[str, Any] = {
        "lengths": [
            {"tokens": tokens, "mean": _mean(by_seed.values()), "seeds": sorted(by_seed)}
            for tokens, by_seed in ends.items()
        ],
        "resamples": RESAMPLES,
        "variants": {},
    }
    if len(ends) < 2:
        return found
    for label, cell in panel.cells.items():
        values = panel.values(label, HEADLINE).items()
        bits = {seed: value for seed, value in values if value is not None and seed in seeds}
        if label == BASELINE or not bits:
            continue
        spent = {}
        for count, flops in COUNTS.items():
            dense, own = (
                flops(next(iter(panel.cells[BASELINE].values()))),
                flops(next(iter(cell.values()))),
            )
            if dense and own:
                ratio = dense / (own * panel.tokens)
                spent[count] = _with_interval(ends, bits, ratio)
        found["variants"][label] = spent
    return found


def _active(record: Record) -> float | None:
    active = record["size"].get("active_parameters")
    return None if active is None else 2.0 * active


def _compiled(record: Record) -> float | None:
    return record["size"].get("compiled_flops_per_token")


# FLOPs for each token, only ever compared with each other.
COUNTS: dict[str, Callable[[Record], float | None]] = {"active": _active, "compiled": _compiled}


def _with_interval(ends: Ends, bits: Mapping[int, float], ratio: float) -> dict[str, Any]:
    seeds = list(bits)
    tokens, bound = _reached(ends, bits, seeds)
    found: dict[str, Any] = {
        "multiplier": tokens * ratio,
        "bound": bound,
        "seeds": len(seeds),
    }
    if len(seeds) < 2:
        return {**found, "low": None, "low_bound": "", "high": None, "high_bound": ""}
    # RandomState, not a Generator: its numbers are the same in all versions of NumPy.
    draw = np.random.RandomState(0)
    picks = draw.randint(0, len(seeds), (RESAMPLES, len(seeds)))
    drawn = sorted(
        (_reached(ends, bits, [seeds[place] for place in pick]) for pick in picks.tolist()),
        key=lambda one: (_PLACE[one[1]], one[0]),
    )
    # Whole draws, nothing between two: some of them are only bounds.
    low, high = drawn[math.floor(0.025 * RESAMPLES)], drawn[math.ceil(0.975 * RESAMPLES) - 1]
    return {
        **found,
        "low": low[0] * ratio,
        "low_bound": low[1],
        "high": high[0] * ratio,
        "high_bound": high[1],
    }


def _reached(ends: Ends, bits: Mapping[int, float], seeds: Sequence[int]) -> tuple[float, str]:
    """With the same seeds in every length and in the variant: they are pairs."""
    curve = [(tokens, _mean(by_seed[s] for s in seeds)) for tokens, by_seed in ends.items()]
    return reach(curve, _mean(bits[seed] for seed in seeds))


def _mean(values: Any) -> float:
    values = list(values)
    return math.fsum(values) / len(values)
