"""How a process of a run stands, as a file for node_exporter's textfile collector."""

import os
from collections.abc import Sequence
from pathlib import Path

from stem_jax.goodput.start_record import StartRecord
from stem_jax.goodput.totals import Totals
from stem_jax.prometheus import metric

FOLDER = "prometheus"


def gauges_path(workdir: Path, process: int) -> Path:
    """The file of a process."""
    return workdir / FOLDER / f"process_{process:03d}.prom"


def gauges_text(run: str, starts: Sequence[StartRecord]) -> str:
    """Args: run: its name. starts: of the process, oldest first, the one that runs last."""
    totals, now = Totals.of(starts), starts[-1]
    own = {"run": run, "process": str(now.process)}
    saved = next((start for start in reversed(starts) if start.saved_step is not None), now)
    rate = now.tokens / now.steps_made / now.step_seconds if now.step_seconds else None
    samples: list[tuple[str, str, str, float | None]] = [
        ("running", "gauge", "1 until the process has ended by itself.", now.end is None),
        ("step", "gauge", "Completed updates of the run.", now.step),
        ("target_steps", "gauge", "Updates that the run shall have.", now.steps),
        ("loss", "gauge", "Training loss of the last step, in nats per token.", now.loss),
        ("tokens_per_second", "gauge", "Of all processes, at the last step.", rate),
        ("step_seconds", "gauge", "Of the last step.", now.step_seconds),
        ("last_record_timestamp_seconds", "gauge", "When the process wrote this.", now.time),
        ("saved_step", "gauge", "Of the last save on the disk.", saved.saved_step),
        (
            "saved_timestamp_seconds",
            "gauge",
            "When the last save was on the disk.",
            saved.saved_time,
        ),
        ("steps_total", "counter", "Steps made, also again.", totals.steps),
        ("redone_steps_total", "counter", "Steps made again after a kill.", totals.redone),
        ("tokens_total", "counter", "Tokens of the steps, of all processes.", totals.tokens),
        ("restarts_total", "counter", "Starts after the first.", totals.starts - 1),
    ]
    lines = []
    for name, kind, said, value in samples:
        if value is not None:
            lines += metric(f"train_{name}", kind, said, [(own, float(value))])
    by_part = [({**own, "part": name}, value) for name, value in totals.parts.items()]
    said = "Time of the main thread by what it did or waited for, over all starts."
    lines += metric("train_time_seconds_total", "counter", said, by_part)
    return "\n".join(lines) + "\n"


def write_gauges(path: Path, text: str) -> None:
    """Whoever reads it meanwhile sees it whole. It need not outlast the machine."""
    path.parent.mkdir(exist_ok=True)
    # The collector reads names that end in .prom.
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
