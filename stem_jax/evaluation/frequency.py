"""Scored tokens in ten equal groups, by how often a run was trained on the token."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from stem_jax.data.trained_pairs import PairCounts
from stem_jax.evaluation.tally import Tally, number

GROUPS = 10
# As the input, whose rows a memory reads; as the target.
SIDES = ("input", "target")


class FrequencySums:
    """Nats, tokens and bytes of scored tokens by the id of their input, and of their target."""

    def __init__(self, counts: PairCounts):
        self._counts = dict(zip(SIDES, (counts.inputs_V, counts.targets_V), strict=True))
        size = len(counts.inputs_V)
        self._sums = {side: np.zeros((3, size)) for side in SIDES}

    def add(
        self, ids: Sequence[Sequence[int]], nats: Sequence[np.ndarray], sizes: Sequence[list[int]]
    ) -> None:
        """Takes windows of n + 1 ids, with nats and bytes of the last n of each."""
        inputs = np.concatenate([window[:-1] for window in ids])
        targets = np.concatenate([window[1:] for window in ids])
        found = np.concatenate(nats), np.ones(len(inputs)), np.concatenate(sizes)
        for side, keys in zip(SIDES, (inputs, targets), strict=True):
            for sum_V, values in zip(self._sums[side], found, strict=True):
                sum_V += np.bincount(keys, values, len(sum_V))

    def record(self) -> dict[str, list[dict[str, Any]]]:
        """`frequency_groups` of each side."""
        return {side: frequency_groups(self._counts[side], *self._sums[side]) for side in SIDES}


def frequency_groups(
    times_V: np.ndarray, nats_V: np.ndarray, tokens_V: np.ndarray, bytes_V: np.ndarray
) -> list[dict[str, Any]]:
    """Ten groups of equal size in scored tokens (to one), the least trained ones first.

    Ids that were trained on equally often are not told apart: where such ones belong to several
    groups, each of these has a share of all their tokens alike.

    Args:
        times_V: [V] how often each id was trained on.
        nats_V, tokens_V, bytes_V: [V] sums over the scored tokens of each id.

    Returns:
        For each group `least` and `most`, how often its ids were trained on, and the record of a
        `Tally` but its perplexity.
    """
    used = np.flatnonzero(tokens_V)
    times_K, kind = np.unique(times_V[used], return_inverse=True)
    nats_K, tokens_K, bytes_K = (
        np.bincount(kind, sum_V[used], len(times_K)) for sum_V in (nats_V, tokens_V, bytes_V)
    )
    ends_K = np.cumsum(tokens_K)
    total = int(tokens_K.sum())
    edges = [total * group // GROUPS for group in range(GROUPS + 1)]
    groups = []
    for first, last in itertools.pairwise(edges):
        inside_K = np.minimum(ends_K, last) - np.maximum(ends_K - tokens_K, first)
        share_K = np.maximum(inside_K, 0) / tokens_K
        nats, size = (math.fsum(share_K * sum_K) for sum_K in (nats_K, bytes_K))
        record = Tally(nats, last - first, size).record()
        del record["perplexity"]
        times = times_K[share_K > 0]
        ends = (int(times[0]), int(times[-1])) if len(times) else (None, None)
        groups.append({"least": ends[0], "most": ends[1], **record})
    return groups


def frequency_lines(name: str, record: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A table of one text, for people."""
    head = "".join(f"  {f'{side} trained':>23}  bits/byte  nats/token" for side in SIDES)
    lines = [f"{name}: tenths of its tokens, by how often the run was trained on them", head]
    for rows in zip(*(record[side] for side in SIDES), strict=True):
        lines.append(
            "".join(
                f"  {_times(row):>23}  {number(row['bits_per_byte']):>9}  {number(row['loss']):>10}"
                for row in rows
            )
        )
    return lines


def _times(row: dict[str, Any]) -> str:
    if row["least"] is None:
        return "-"
    ends = dict.fromkeys((f"{row['least']:,}", f"{row['most']:,}"))
    return "-".join(ends)
