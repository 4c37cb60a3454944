"""How much of held-out documents the training text holds, word for word."""

from collections.abc import Sequence

import numpy as np


def overlap_of(held_out: Sequence[np.ndarray], training: Sequence[np.ndarray]) -> list[float]:
    """Of each held-out document the share of its runs of 13 words that training documents hold.

    Args:
        held_out, training: of each document its distinct runs, [n] uint64 (`WordRuns.of`).

    Returns:
        Shares in [0, 1]; 0 for a document without runs.
    """
    seen_n = np.unique(np.concatenate([np.empty(0, np.uint64), *training]))
    return [_held(runs_n, seen_n) for runs_n in held_out]


def overall(shares: Sequence[float], held_out: Sequence[np.ndarray]) -> float:
    """The share of all runs of the held-out documents, each document's counted; 0 without any."""
    sizes = np.array([len(runs_n) for runs_n in held_out], np.int64)
    return float(np.dot(shares, sizes) / sizes.sum()) if sizes.sum() else 0.0


def _held(runs_n: np.ndarray, seen_n: np.ndarray) -> float:
    if not len(runs_n) or not len(seen_n):
        return 0.0
    place_n = np.minimum(np.searchsorted(seen_n, runs_n), len(seen_n) - 1)
    return float((seen_n[place_n] == runs_n).mean())
