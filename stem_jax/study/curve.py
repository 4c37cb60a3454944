"""How a run of a study went: its curve, its spikes and the spread of its gradient norm."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from stem_jax.training.metrics import METRICS, read_records

# Of the loss, each a mean over so many logged steps alike.
_POINTS = 400
# Losses before one that say whether it is a spike, and by how much it lies above them.
_WINDOW = 50
_DEVIATIONS = 6


def curve_of(workdir: Path, tokens_per_step: int) -> dict[str, list[Any]]:
    """The losses that a run logged, thinned, and all its validations.

    Returns:
        `tokens`, `loss`: of at most 400 blocks of logged steps, the tokens trained on at the end
        of each and the mean of its finite losses in nats per token, None without one. `dev_tokens`,
        `dev_bits_per_byte`: of each validation.
    """
    records = read_records(workdir / METRICS)
    logged = [record for record in records if "train/loss" in record]
    found = [record for record in records if record.get("eval/bits_per_byte") is not None]
    size = max(1, math.ceil(len(logged) / _POINTS))
    blocks = [logged[first : first + size] for first in range(0, len(logged), size)]
    return {
        "tokens": [block[-1]["step"] * tokens_per_step for block in blocks],
        "loss": [_mean([record["train/loss"] for record in block]) for block in blocks],
        "dev_tokens": [record["step"] * tokens_per_step for record in found],
        "dev_bits_per_byte": [record["eval/bits_per_byte"] for record in found],
    }


def stability_of(workdir: Path, warmup_steps: int) -> dict[str, float]:
    """How smoothly a run trained, by its logged steps.

    Returns:
        `spikes`: losses above the median of the 50 before them by more than six times their median
        absolute deviation from it; those that are not finite are spikes, too, and nobody's
        neighbours. `gradient_norm_spread`: the 95th percentile of the backbone's gradient norm
        before clipping, divided by its median, after the warm-up; absent without such norms.
    """
    records = [r for r in read_records(workdir / METRICS) if "train/loss" in r]
    measures: dict[str, float] = {"spikes": _spikes([record["train/loss"] for record in records])}
    norms = [
        record["train/grad_norm"]
        for record in records
        if record["step"] > warmup_steps and record.get("train/grad_norm") is not None
    ]
    if norms and (median := float(np.median(norms))) > 0:
        measures["gradient_norm_spread"] = float(np.percentile(norms, 95)) / median
    return measures


def _spikes(losses: list[float | None]) -> int:
    """What is not finite was logged as None."""
    count = 0
    before: list[float] = []
    for loss in losses:
        if loss is None:
            count += 1
            continue
        if len(before) >= _WINDOW:
            recent = np.asarray(before[-_WINDOW:])
            median = np.median(recent)
            count += bool(loss > median + _DEVIATIONS * np.median(np.abs(recent - median)))
        before.append(loss)
    return count


def _mean(losses: list[float | None]) -> float | None:
    finite = [loss for loss in losses if loss is not None]
    return math.fsum(finite) / len(finite) if finite else None
