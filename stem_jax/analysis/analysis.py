"""Everything that is measured of a trained model, beside a dense twin if there is one."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stem_jax.analysis.capacity import TEXT_TOKENS, Capacity, measure_capacity
from stem_jax.analysis.cost_table import check_cost, cost_table
from stem_jax.analysis.flop_check import FlopCheck
from stem_jax.analysis.geometry import LayerGeometry, SpreadVerdict, spread_verdict
from stem_jax.analysis.options import AnalysisOptions
from stem_jax.analysis.stability import Stability, read_stability
from stem_jax.analysis.token_text import TokenText, open_text
from stem_jax.analysis.token_vectors import (
    TokenSample,
    mean_geometry,
    row_geometry,
    sample_tokens,
)
from stem_jax.checkpoints.loading import LoadedRun, load_run
from stem_jax.config import differing_keys, keys_of
from stem_jax.config_keys import Role
from stem_jax.editing.saved_tables import EditTable, read_edit_tables
from stem_jax.errors import InputError
from stem_jax.memory.catalogue import table_specs
from stem_jax.memory.memory import STEM
from stem_jax.model.cost import ParameterCount, count_parameters
from stem_jax.training.run_data import reading_of

KINDS = ("plain", "centred", "frequent")
# What twins differ in by intent, and a path, of whose tokenizer the fingerprint is compared.
_EXPECTED = ("model.stem_layers", "data.tokenizer_path")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A run that is looked at. stability: None where no training was recorded."""

    workdir: Path
    run: LoadedRun
    parameters: ParameterCount
    stability: Stability | None

    @classmethod
    def load(
        cls, workdir: Path, step: int | None, resident_rows: int | None, flag: str = "--workdir"
    ) -> "Subject":
        """Loads a run; raises InputError as `load_run` does."""
        run = load_run(workdir, step, resident_rows, flag)
        clips = run.config.optimizer.clip_norm, run.config.tables.clip_norm
        specs = table_specs(run.config)
        of_memories = {name: spec.clip_norm for name, spec in specs.items() if name != STEM}
        stability = read_stability(workdir, run.step, *clips, of_memories)
        return cls(workdir, run, count_parameters(run.config), stability)

    def record(self) -> dict[str, Any]:
        """As JSON, without the training."""
        model, train = self.run.config.model, self.run.config.train
        return {
            "workdir": str(self.workdir),
            "step": self.run.step,
            "stem_layers": list(model.stem_layers),
            "parameters": dataclasses.asdict(self.parameters),
            "tokenizer": self.run.tokenizer.fingerprint,
            "model": dataclasses.asdict(model),
            "train": dataclasses.asdict(train),
            "sources": self.run.config.data.sources,
        }


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What was found.

    own, dense: the runs. differences: (key, own value, the twin's) of their configurations. text:
    its name. sample: tokens whose vectors were looked at. rows: geometry of the STEM layers.
    means: geometry of the up projections of the dense run (the twin, or the run itself). capacity:
    None without tables. costs: see `cost_table`. checks: formulas beside compiled programs.
    edits: tables of measured edits.
    """

    own: Subject
    dense: Subject | None
    differences: list[tuple[str, Any, Any]]
    text: str
    sample: TokenSample
    rows: list[LayerGeometry]
    means: list[LayerGeometry]
    capacity: Capacity | None
    costs: list[dict[str, Any]]
    checks: list[FlopCheck]
    edits: list[EditTable]

    def verdict(self, kind: str) -> SpreadVerdict | None:
        """See `spread_verdict`; None without a twin."""
        return spread_verdict(self.rows, self.means, kind)

    def record(self) -> dict[str, Any]:
        """Every figure, as JSON."""
        verdicts = {kind: self.verdict(kind) for kind in KINDS}
        trained = {"run": self.own, "dense": self.dense}
        return {
            "run": self.own.record(),
            "dense": self.dense and self.dense.record(),
            "differences": self.differences,
            "text": {
                "name": self.text,
                "tokens": self.sample.tokens,
                "distinct_tokens": self.sample.distinct,
                "sampled_tokens": self.sample.seen,
                "sampled_unseen_tokens": len(self.sample.ids) - self.sample.seen,
            },
            "geometry": {
                "rows": [geometry.record() for geometry in self.rows],
                "dense": [geometry.record() for geometry in self.means],
                "wider_angular_spread": {
                    kind: verdict and dataclasses.asdict(verdict) | {"verdict": verdict.word}
                    for kind, verdict in verdicts.items()
                },
            },
            "capacity": self.capacity and self.capacity.record(),
            "cost": {
                "by_stem_layers": self.costs,
                "checks": [check.record() for check in self.checks],
            },
            "stability": {
                name: subject and subject.stability and subject.stability.record()
                for name, subject in trained.items()
            },
            "editing": [dataclasses.asdict(table) for table in self.edits],
        }


def analyze(workdir: Path, dense_workdir: Path | None, options: AnalysisOptions) -> Analysis:
    """Looks into a run, on one device.

    Args:
        workdir: of the run. dense_workdir: of its dense twin, with the same tokenizer.

    Raises:
        InputError: runs without a checkpoint, twins that are none, or text that cannot be used.
    """
    edits = read_edit_tables(workdir)
    own = Subject.load(workdir, options.step, options.resident_rows)
    dense = None
    if dense_workdir is not None:
        dense = Subject.load(dense_workdir, options.dense_step, None, "--dense-workdir")
        _check_twins(own, dense)

    def bar(what: str) -> Callable[[Iterable], Iterable]:
        # None: only on a terminal.
        off = None if options.progress else True
        return functools.partial(tqdm, desc=what, disable=off)

    config = own.run.config
    reading = reading_of(config.data, options.text_field, options.format)
    with open_text(own.run, workdir, options.text, reading) as text:
        vocab_size, known = config.model.vocab_size, own.run.tokenizer.vocab_size
        sizes = (options.tokens, vocab_size, known, options.rows, options.seed)
        sample = sample_tokens(text, *sizes)
        rows = row_geometry(own.run, sample) if config.model.stem_layers else []
        means = _means(own, dense, sample, text, options.tokens, bar("up projections"))
        capacity = None
        if config.model.stem_layers:
            ids, context = text.ids(TEXT_TOKENS), config.train.seq_len
            capacity = measure_capacity(config.model, ids, context, bar("contexts"))
        name = text.name
    own.run.close()
    return Analysis(
        own=own,
        dense=dense,
        differences=_differences(own, dense) if dense else [],
        text=name,
        sample=sample,
        rows=rows,
        means=means,
        capacity=capacity,
        costs=cost_table(config),
        checks=check_cost(config),
        edits=[table.seen_from(own.run.fingerprint) for table in edits],
    )


def _means(
    own: Subject,
    dense: Subject | None,
    sample: TokenSample,
    text: TokenText,
    tokens: int | None,
    bar: Callable[[Iterable], Iterable],
) -> list[LayerGeometry]:
    """Of the twin's projections in the layers where the run has rows; without rows of its own."""
    model = own.run.config.model
    if not model.stem_layers:
        # What layers read is asked of a model without any rows.
        if own.run.rows:
            return []
        layers = tuple(range(model.num_layers))
        return mean_geometry(own.run, sample, text, tokens, layers, bar)
    if dense is None:
        return []
    there = dense.run.config.model.num_layers
    layers = tuple(layer for layer in model.stem_layers if layer < there)
    return mean_geometry(dense.run, sample, text, tokens, layers, bar)


def _check_twins(own: Subject, dense: Subject) -> None:
    if others := [name for name in dense.run.rows if name != STEM]:
        raise InputError(
            f"--dense-workdir={dense.workdir} has rows of {', '.join(others)}; give a run that was "
            "trained without such memories"
        )
    if dense.run.config.model.stem_layers:
        layers = ",".join(map(str, dense.run.config.model.stem_layers))
        raise InputError(
            f"--dense-workdir={dense.workdir} has STEM layers {layers}; give a run that was "
            "trained with model.stem_layers=none"
        )
    if not own.run.config.model.stem_layers:
        raise InputError(
            f"--workdir={own.workdir} is dense itself and has no rows to compare; give the STEM "
            "run there, or leave out --dense-workdir"
        )
    mine, theirs = own.run.tokenizer.fingerprint, dense.run.tokenizer.fingerprint
    if mine != theirs:
        raise InputError(
            f"--dense-workdir={dense.workdir} was trained with tokenizer {theirs[:12]}, "
            f"--workdir={own.workdir} with {mine[:12]}: their ids stand for other words; train the "
            "twin with data.tokenizer_path set to the tokenizer of the other"
        )


def _differences(own: Subject, dense: Subject) -> list[tuple[str, Any, Any]]:
    mine, theirs = own.run.config, dense.run.config
    compared = [
        key
        for key in differing_keys(mine, theirs)
        if key.partition(".")[0] in ("model", "data", "optimizer", "train")
        and key not in (*keys_of(Role.HARMLESS), *_EXPECTED)
    ]
    steps = own.run.step, dense.run.step
    found = [] if steps[0] == steps[1] else [("checkpoint", *steps)]
    return found + [(key, mine.value_of(key), theirs.value_of(key)) for key in compared]
