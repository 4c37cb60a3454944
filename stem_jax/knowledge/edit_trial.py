"""One measurement of edits from its settings to its files."""

import dataclasses
import json
from pathlib import Path

from stem_jax.knowledge.edit_cases import fact_cases
from stem_jax.knowledge.edit_datasets import read_edit_dataset
from stem_jax.knowledge.edit_measurement import EditOutcome, lay_edits, measure_edits
from stem_jax.knowledge.edit_report import (
    format_fluency,
    format_summary,
    summarize,
    write_measurement,
)
from stem_jax.knowledge.fluency import Fluency, fluency
from stem_jax.knowledge.swaps import swap_recipes
from stem_jax.loading import LoadedRun

FACTS = "facts"


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

    @property
    def name(self) -> str:
        """Tells trials apart in a folder."""
        parts = [Path(self.source).stem, self.written, *self._facts_only()]
        parts.append(self.strategy)
        if self.layers is not None:
            parts.append("layers-" + "-".join(map(str, self.layers)))
        return "_".join(parts)

    @property
    def title(self) -> str:
        """For people."""
        where = "all layers with tables" if self.layers is None else f"layers {self.layers}"
        what = f"rows in {where}" if self.written == "rows" else "token embeddings instead of rows"
        names = " of names of different token counts" if self.tokens == "differing" else ""
        how = f" ({self.strategy})" if names or self.source != FACTS else ""
        return f"Edits{names} from {Path(self.source).name}{how}, percent: {what}"

    def _facts_only(self) -> list[str]:
        return [self.tokens, f"seed-{self.seed}"] if self.source == FACTS else []


@dataclasses.dataclass(frozen=True)
class TrialResult:
    """outcomes: of each edit. fluency: None if it was not asked for. left_out: records that could
    not be tried."""

    trial: Trial
    outcomes: list[EditOutcome]
    fluency: Fluency | None
    left_out: int

    @property
    def note(self) -> str:
        """What the table does not say."""
        parts = [] if self.fluency is None else [format_fluency(self.fluency)]
        if self.left_out:
            parts.append(f"{self.left_out} records without a donor were left out")
        return "; ".join(parts)

    def write(self, folder: str | Path) -> list[Path]:
        """See `edit_report.write_measurement`."""
        trial = self.trial
        return write_measurement(folder, trial.name, trial.title, self.note, self.outcomes)

    def format(self) -> str:
        """Title, table and note for a terminal."""
        lines = [self.trial.title, format_summary(summarize(self.outcomes))]
        return "\n".join([*lines, self.note] if self.note else lines)

    def json(self) -> str:
        """The same for a program."""
        settings = {"settings": dataclasses.asdict(self.trial), "left_out": self.left_out}
        found = None if self.fluency is None else dataclasses.asdict(self.fluency)
        return json.dumps({**settings, "fluency": found, "rows": summarize(self.outcomes)})


def try_edits(
    run: LoadedRun, trial: Trial, *, with_fluency: bool = True, progress: bool = True
) -> TrialResult:
    """Runs a trial; raises InputError as the functions named in `Trial` do.

    Args:
        with_fluency: sample completions too, where rows are written.
    """
    left_out = 0
    if trial.source == FACTS:
        choice = {"pairs": trial.pairs, "tokens": trial.tokens, "seed": trial.seed}
        cases = fact_cases(run.tokenizer, strategy=trial.strategy, **choice)
    else:
        dataset = read_edit_dataset(trial.source)
        cases, left_out = dataset.cases, dataset.without_donor
    options = {"strategy": trial.strategy, "layers": trial.layers, "written": trial.written}
    outcomes = measure_edits(run, cases, **options, progress=progress)
    found = None
    if with_fluency and trial.written == "rows":
        recipes = [swap_recipes(run.tokenizer, case.swap, trial.strategy) for case in cases]
        found = fluency(lay_edits(run, recipes, trial.layers), cases)
    return TrialResult(trial, outcomes, found, left_out)
