"""What a run records: metrics.jsonl, what trackers make of it, and the loss curve as a picture."""

import json
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stem_jax.training.trackers.tracker import Course
from stem_jax.training.trackers.tracking import Tracking

METRICS = "metrics.jsonl"
Record = dict[str, Any]


class MetricsLog:
    """Appends records to `metrics.jsonl`, and keeps them for the trackers and the picture.

    A resumed run drops what was logged after the checkpoint it resumes from: every step stands
    in the file once.
    """

    def __init__(
        self,
        workdir: Path,
        start_step: int,
        *,
        writing: bool = True,
        tracking: Tracking | None = None,
        awaits: Callable[[int], bool] = lambda step: False,
    ):
        """Reads the file that is there.

        Args:
            writing: of the processes of a run one writes, the others keep the records alone.
            tracking: what follows the records.
            awaits: whether a step that was recorded gets another record, of its validation.
        """
        self._path = workdir / METRICS
        self._picture = workdir / "loss.png"
        self._writing = writing
        found = read_records(self._path)
        self.records = [r for r in found if r["step"] <= start_step]
        self._tracking = tracking
        if tracking is not None:
            later = [r for r in found if r["step"] > start_step and "train/loss" in r]
            taken_back = {r["step"]: r["train/loss"] for r in later}
            tracking.follow(Course(self.records, awaits, taken_back))
        if not writing:
            return
        text = "".join(json.dumps(record) + "\n" for record in self.records)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(self._path)
        self._file = self._path.open("a")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one record; numbers keep their full precision, non-finite ones become null."""
        clean = {
            key: value if not isinstance(value, float) or math.isfinite(value) else None
            for key, value in values.items()
        }
        record = {"step": step, **clean}
        self.records.append(record)
        if not self._writing:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._tracking is not None:
            self._tracking.wake()

    def close(self) -> None:
        """Writes the picture and closes the files."""
        if not self._writing:
            return
        self._file.close()
        draw_loss(self.records, self._picture)


class SpikeCounter:
    """Counts loss spikes: losses far above the recent ones.

    A loss is a spike when it exceeds the median of the last 100 by six times their median absolute
    deviation (scaled to a standard deviation), once there are 20.
    """

    def __init__(self, losses: list[float]):
        self._recent: deque[float] = deque(maxlen=100)
        self.count = 0
        for loss in losses:
            self.add(loss)

    def add(self, loss: float) -> None:
        """Takes the next loss; a non-finite one counts as a spike and is not remembered."""
        if not math.isfinite(loss):
            self.count += 1
            return
        if len(self._recent) >= 20:
            median = float(np.median(self._recent))
            deviation = 1.4826 * float(np.median(np.abs(np.asarray(self._recent) - median)))
            self.count += loss > median + 6 * deviation
        self._recent.append(loss)


def draw_loss(records: list[Record], path: Path) -> None:
    """Draws training and validation loss over steps, in nats per token."""
    # At the end of a run: it takes half a second that no start need wait for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [(r["step"], r["train/loss"]) for r in records if r.get("train/loss") is not None]
    held_out = [(r["step"], r["eval/loss"]) for r in records if r.get("eval/loss") is not None]
    # A figure of its own, not pyplot's: pyplot keeps global state and may look for a display.
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), lw=0.8, alpha=0.45, color="C0", label="training")
        steps, losses = np.asarray(train).T
        width = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, color="C0", label=f"training, mean of {width}")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="C1", label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if train or held_out:
        axes.legend()
    figure.savefig(path)


def read_records(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`, oldest first; none if there is no such file."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            # A killed process can leave half a last line.
            break
    return records
