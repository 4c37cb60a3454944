"""Runs of shipped configurations over seeds, and how far held-out bits per byte of two lie apart.

Runs are kept in a folder: what is complete is not trained again.
"""

import csv
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.children import environment

# Student's t: 97.5% of all lie below, by degrees of freedom from 1.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class SeedRuns:
    """Runs below a folder, on the same text: the documentation that every Python carries."""

    def __init__(self, folder: Path, vocab_size: int = 4096):
        self.folder, self._vocab_size = folder, vocab_size
        self._text = folder / "text"

    def train(self, config: str, name: str, seed: int, steps: int, keys: dict[str, Any]) -> Path:
        """Trains `configs/CONFIG.py`, or finds it trained; the work folder.

        Args:
            name: of the run, beside its seed.
            keys: of the configuration, beside seed and steps.
        """
        if not self._text.exists():
            flags = ["--corpus=pydoc", f"--vocab-size={self._vocab_size}", f"--out={self._text}"]
            self._run("prepare", flags)
        workdir = self.folder / f"{name}_seed_{seed}"
        # Validations beside the last, samples and baselines cost time and change no figure.
        chosen = {
            "data.sources": self._text,
            "train.steps": steps,
            "train.seed": seed,
            "train.sample_prompt": "",
            "train.compilation_cache": self.folder / "compiled",
            "eval.every": steps,
            "eval.baselines": False,
            "checkpoint.every": steps,
            "checkpoint.keep": 1,
        } | keys
        flags = [f"--config=configs/{config}.py", f"--workdir={workdir}"]
        self._run("train", [*flags, *(f"--config.{key}={value}" for key, value in chosen.items())])
        return workdir

    def _run(self, program: str, flags: list[str]) -> None:
        command = [sys.executable, "-m", f"stem_jax.{program}", *flags]
        subprocess.run(command, check=True, env=environment(), stdout=sys.stderr)


def records(workdir: Path) -> list[dict[str, Any]]:
    """What a run has logged, in order."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def bits_per_byte(workdir: Path) -> float:
    """Of the held-out text, after the last step."""
    return [r["eval/bits_per_byte"] for r in records(workdir) if "eval/bits_per_byte" in r][-1]


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """The mean of differences, one of each seed, and the ends of Student's 95% interval of it."""
    mean, number = statistics.fmean(differences), len(differences)
    reach = _T[number - 2] * statistics.stdev(differences) / math.sqrt(number)
    return mean, mean - reach, mean + reach


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All figures, a line each."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
