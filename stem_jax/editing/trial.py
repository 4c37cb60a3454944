"""One measurement of edits from its settings to its files."""

import argparse
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from stem_jax.checkpoints.loading import LoadedRun
from stem_jax.editing.cases import fact_cases
from stem_jax.editing.choices import FACTS
from stem_jax.editing.datasets import read_edit_dataset
from stem_jax.editing.fluency import Fluency, fluency
from stem_jax.editing.measurement import NOT_READ, EditOutcome, measure_edits
from stem_jax.editing.report import (
    COLUMNS,
    format_csv,
    format_fluency,
    format_summary,
    summarize,
)
from stem_jax.memory.memory import STEM
from stem_jax.processes.agreement import check_same
from stem_jax.result_folder import check_folder, write_files

_NAMES = {
    "one": "",
    "more": " of names with more tokens than the donor's",
    "fewer": " of names with fewer tokens than the donor's",
    "differing": " of names of another number of tokens",
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is tried: see `edit_cases.fact_cases` and `edit_measurement.measure_edits`.

    source: FACTS, whose edits `pairs`, `tokens` and `seed` choose, or a file for
    `edit_datasets.read_edit_dataset`.
    """

    source: str = FACTS
    pairs: int = 200
    tokens: str = "one"
    strategy: str = "average"
    layers: tuple[int, ...] | None = None
    written: str = "rows"
    seed: int = 0
    memory: str = STEM

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> "Trial":
        """The one that the flags of `stem_jax.edit` describe."""
        names = ("pairs", "tokens", "strategy", "layers", "write", "seed", "memory")
        return cls(args.measure, *(getattr(args, name) for name in names))

    @property
    def name(self) -> str:
        """Tells trials apart in a folder, but for files of the same name."""
        parts = [Path(self.source).stem, self.written]
        if self.source == FACTS:
            parts += [self.tokens, f"pairs-{self.pairs}", f"seed-{self.seed}"]
        parts.append(self.strategy)
        if self.layers is not None:
            parts.append("layers-" + "-".join(map(str, self.layers)))
        if self.memory != STEM:
            parts.append(self.memory)
        return "_".join(parts)

    @property
    def title(self) -> str:
        """For people."""
        where = "all layers with tables"
        if self.layers is not None:
            where = f"layers {', '.join(map(str, self.layers))}"
        rows = "rows" if self.memory == STEM else f"{self.memory} rows"
        what = (
            f"{rows} in {where}" if self.written == "rows" else "token embeddings instead of rows"
        )
        names = _NAMES[self.tokens] if self.source == FACTS else ""
        how = f" ({self.strategy})" if names or self.source != FACTS else ""
        return f"Edits{names} from {Path(self.source).name}{how}, percent: {what}"


@dataclasses.dataclass(frozen=True)
class TrialResult:
    """step, run: checkpoint that was edited, and its fingerprint. outcomes: of each edit. fluency:
    None if it was not asked for. left_out: records without a donor. unfit: records whose names the
    strategy does not fit."""

    trial: Trial
    step: int
    run: str
    outcomes: list[EditOutcome]
    fluency: Fluency | None
    left_out: int
    unfit: int = 0

    @property
    def note(self) -> str:
        """What the table does not say."""
        parts = [] if self.fluency is None else [format_fluency(self.fluency)]
        if self.left_out:
            parts.append(f"records without a donor, left out: {self.left_out}")
        if self.unfit:
            parts.append(
                f"records whose names {self.trial.strategy} does not fit, or with a token twice, "
                f"left out: {self.unfit}"
            )
        if unread := sum(outcome.answer == NOT_READ for outcome in self.outcomes):
            parts.append(
                f"{unread} of {len(self.outcomes)} edits are not in the shares: their prompt reads "
                "no edited row, as the subject is not in it, or with other tokens (at its start, "
                "in quotes, in capitals)"
            )
        return "; ".join(parts)

    def write(self, folder: str | Path) -> list[Path]:
        """Writes NAME.csv, and NAME.json, a table that `stem_jax.analyze` shows.

        Raises:
            InputError: they cannot be written.
        """
        name = self.trial.name
        files = {
            f"{name}.csv": format_csv(self.outcomes).encode(),
            f"{name}.json": (json.dumps(self.record(), indent=2) + "\n").encode(),
        }
        return write_files(Path(folder), files)

    def format(self) -> str:
        """Title, table and note for a terminal."""
        lines = [self.trial.title, format_summary(summarize(self.outcomes))]
        return "\n".join([*lines, self.note] if self.note else lines)

    def record(self) -> dict[str, Any]:
        """The same for a program."""
        found = None if self.fluency is None else dataclasses.asdict(self.fluency)
        return {
            "title": self.trial.title,
            "columns": COLUMNS,
            "rows": summarize(self.outcomes),
            "note": self.note,
            "settings": dataclasses.asdict(self.trial),
            "step": self.step,
            "run": self.run,
            "fluency": found,
            "left_out": self.left_out,
            "unfit": self.unfit,
        }


def try_edits(
    run: LoadedRun, trial: Trial, *, with_fluency: bool = True, progress: bool = True
) -> TrialResult:
    """Runs a trial; raises InputError as the functions named in `Trial` do.

    Args:
        with_fluency: sample completions too, where rows are written.
    """
    left_out = unfit = 0
    if trial.source == FACTS:
        cases = fact_cases(
            run.tokenizer,
            pairs=trial.pairs,
            tokens=trial.tokens,
            strategy=trial.strategy,
            seed=trial.seed,
        )
    else:
        dataset = read_edit_dataset(trial.source)
        cases = dataset.swappable(run.tokenizer, trial.strategy)
        left_out, unfit = dataset.without_donor, len(dataset.cases) - len(cases)
    outcomes = measure_edits(
        run,
        cases,
        strategy=trial.strategy,
        layers=trial.layers,
        written=trial.written,
        memory=trial.memory,
        progress=progress,
    )
    found = None
    if with_fluency and trial.written == "rows":
        read = [outcome.case for outcome in outcomes if outcome.answer != NOT_READ]
        found = (
            fluency(run, read, trial.strategy, trial.layers, memory=trial.memory) if read else None
        )
    return TrialResult(trial, run.step, run.fingerprint, outcomes, found, left_out, unfit)


def write_trial(
    run: LoadedRun, trial: Trial, folder: Path, first: bool = True
) -> tuple[TrialResult, list[Path]]:
    """Runs a trial, whose questions several processes divide, and writes its files.

    Args:
        first: of the processes this one writes, and shows how far it is.

    Returns:
        The result, which every process has, and the files, none in the others.

    Raises:
        InputError: see `try_edits`, or the folder cannot be written, which is asked before.
    """
    # Files and checkpoints of one name may be others on another host.
    check_same({"checkpoint": run.fingerprint, **_digest(trial.source)})
    if first:
        check_folder(folder)
    result = try_edits(run, trial, progress=first)
    return result, result.write(folder) if first else []


def _digest(source: str) -> dict[str, str]:
    path = Path(source)
    if source == FACTS or not path.is_file():
        return {}
    return {"--measure": hashlib.sha256(path.read_bytes()).hexdigest()}
