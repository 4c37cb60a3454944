"""How often intervals find what is not there: dense against itself (A/A), in all splits."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from stem_jax.study.intervals import LEVEL, student
from stem_jax.study.measured import HEADLINE
from stem_jax.study.panels import BASELINE, Panel, Record, of_purpose, value_of

RUNS = 10
# Random pairings of each split: with one, a measure's share swings by two points, with 20 by one.
PAIRINGS = 20
MOST_RESOLVED = 0.10


def splits(count: int = RUNS) -> list[tuple[list[int], list[int]]]:
    """All ways to make two halves of so many runs: 126 of ten."""
    rest = range(1, count)
    halves = [(0, *others) for others in itertools.combinations(rest, count // 2 - 1)]
    return [(list(half), [x for x in range(count) if x not in half]) for half in halves]


def share_resolved(
    values: Sequence[float],
    factor: Callable[[float, int], float] = student,
    pairings: int = PAIRINGS,
) -> float:
    """Share of splits, each with random pairs, whose interval leaves out zero.

    Args:
        values: one of each run.
        factor: of the standard error, by level and degrees of freedom.
    """
    values_R = np.asarray(values, np.float64)
    pairs = len(values) // 2
    # RandomState, not a Generator: its numbers are the same in all versions of NumPy.
    draw = np.random.RandomState(0)
    differences = []
    for half, other in splits(len(values)):
        for _ in range(pairings):
            differences.append(values_R[half] - values_R[draw.permutation(other)])
    differences_TxP = np.stack(differences)
    mean_T = differences_TxP.mean(axis=1)
    error_T = differences_TxP.std(axis=1, ddof=1) / np.sqrt(pairs)
    return float(np.mean(np.abs(mean_T) > factor(LEVEL, pairs - 1) * error_T))


def resample(panel: Panel) -> dict[str, Any]:
    """A/A over a panel's dense runs, the first ten by seed.

    Returns:
        "runs": how many there are; "splits", "pairings"; "shares": of each measure that all ten
        have, {} with fewer than ten; "passes": whether none is over `MOST_RESOLVED`, None of none.
    """
    dense = dict(itertools.islice(panel.cells.get(BASELINE, {}).items(), RUNS))
    shares: dict[str, float] = {}
    if len(dense) == RUNS:
        for measure in panel.measures():
            values = [value_of(record, measure) for record in dense.values()]
            known = [value for value in values if value is not None]
            if len(known) == RUNS and len(set(known)) > 1:
                shares[measure] = share_resolved(known)
    return {
        "runs": len(dense),
        "splits": len(splits()),
        "pairings": PAIRINGS,
        "most": MOST_RESOLVED,
        "shares": shares,
        "passes": all(x <= MOST_RESOLVED for x in shares.values()) if shares else None,
    }


def planted(records: Sequence[Record], panel: Panel) -> dict[str, Any] | None:
    """Dense with fewer tokens against dense: a difference that is there, None without such runs.

    Returns:
        "tokens" of both, "difference" of the held-out bits per byte, "found": whether its interval
        is wholly above zero.
    """
    runs: Mapping[int, Record] = {
        record["run"]["seed"]: record
        for record in of_purpose(records, "planted")
        if record["run"]["text"] == panel.text
    }
    if not runs:
        return None
    shorter = Panel(panel.text, panel.tokens, False, {"shorter": runs, **panel.cells})
    values, interval = shorter.difference("shorter", BASELINE, HEADLINE)
    low = interval.low if interval else None
    return {
        "tokens": next(iter(runs.values()))["run"]["tokens"],
        "dense_tokens": panel.tokens,
        "difference": interval.to_dict() if interval else None,
        "values": {str(seed): value for seed, value in values.items()},
        "diverged": shorter.diverged("shorter"),
        "found": low is not None and low > 0,
    }
