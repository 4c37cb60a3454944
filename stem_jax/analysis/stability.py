"""How smoothly a run trained, from what it recorded."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stem_jax.training.metrics import SpikeCounter, read_records

# Steps at the end whose losses are averaged.
LAST = 50


@dataclasses.dataclass(frozen=True)
class NormSummary:
    """Gradient norms before clipping. clipped: share of the steps above the norm they are cut to.

    p95: 95th percentile.
    """

    median: float
    p95: float
    largest: float
    clip_norm: float
    clipped: float


@dataclasses.dataclass(frozen=True)
class Stability:
    """A training run as its metrics tell it.

    steps: [n] logged ones. losses: [n] nats per token, nan where not finite. held_out: (step, loss)
    of validations. spikes: steps whose loss is one, see `SpikeCounter`. skipped: batches that
    changed nothing, as loss or gradients were not finite. last_loss: mean over the last LAST
    steps, as far as they are logged. backbone_norms, table_norms: [n]; empty where that part was
    not trained. backbone, tables: their summaries. memory_norms, memories: of memories beside
    STEM's that were, by name.
    """

    steps: list[int]
    losses: list[float]
    held_out: list[tuple[int, float]]
    spikes: list[int]
    skipped: int
    last_loss: float
    backbone_norms: list[float]
    table_norms: list[float]
    backbone: NormSummary | None
    tables: NormSummary | None
    memory_norms: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    memories: dict[str, NormSummary | None] = dataclasses.field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As JSON, which has no nan: None."""
        return _clean(dataclasses.asdict(self))


def read_stability(
    workdir: str | Path,
    step: int,
    clip_norm: float,
    table_clip_norm: float,
    memory_clip_norms: Mapping[str, float] | None = None,
) -> Stability | None:
    """Reads `metrics.jsonl` of a work folder up to a step; None without training records.

    Args:
        clip_norm, table_clip_norm: that gradients of backbone and STEM's tables were cut to.
        memory_clip_norms: likewise of other memories, by name.
    """
    records = [r for r in read_records(Path(workdir) / "metrics.jsonl") if r["step"] <= step]
    trained = [record for record in records if "train/loss" in record]
    if not trained:
        return None
    steps = [record["step"] for record in trained]
    held_out = [
        (record["step"], record["eval/loss"])
        for record in records
        if record.get("eval/loss") is not None
    ]
    losses = _column(trained, "train/loss")
    backbone_norms, table_norms = (
        _column(trained, key) if key in trained[-1] else []
        for key in ("train/grad_norm", "train/table_grad_norm")
    )
    clip_norms = memory_clip_norms or {}
    memory_norms = {
        name: _column(trained, key)
        for name in clip_norms
        if (key := f"train/{name}_grad_norm") in trained[-1]
    }
    finite = [
        loss for at, loss in zip(steps, losses) if at > steps[-1] - LAST and math.isfinite(loss)
    ]
    return Stability(
        steps=steps,
        losses=losses,
        held_out=held_out,
        spikes=_spikes(steps, losses),
        skipped=int(trained[-1].get("train/skipped_steps") or 0),
        last_loss=float(np.mean(finite)) if finite else math.nan,
        backbone_norms=backbone_norms,
        table_norms=table_norms,
        backbone=_summary(backbone_norms, clip_norm),
        tables=_summary(table_norms, table_clip_norm),
        memory_norms=memory_norms,
        memories={name: _summary(found, clip_norms[name]) for name, found in memory_norms.items()},
    )


def _spikes(steps: list[int], losses: list[float]) -> list[int]:
    counter, found = SpikeCounter([]), []
    for step, loss in zip(steps, losses):
        before = counter.count
        counter.add(loss)
        if counter.count > before:
            found.append(step)
    return found


def _column(records: list[dict], key: str) -> list[float]:
    """A key of all records; what is not finite was written as null."""
    return [math.nan if record.get(key) is None else float(record[key]) for record in records]


def _summary(norms: list[float], clip_norm: float) -> NormSummary | None:
    finite = np.asarray([norm for norm in norms if math.isfinite(norm)])
    if not len(finite):
        return None
    return NormSummary(
        median=float(np.median(finite)),
        p95=float(np.percentile(finite, 95)),
        largest=float(finite.max()),
        clip_norm=clip_norm,
        clipped=float((finite > clip_norm).mean()),
    )


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
