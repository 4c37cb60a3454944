"""A study done: what there is is taken, what is missing is trained and measured, then written."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stem_jax.config import Config
from stem_jax.errors import InputError
from stem_jax.files import read_json
from stem_jax.lock import Lock
from stem_jax.study import code_state
from stem_jax.study.intervals import half_width_to_come
from stem_jax.study.measured import HEADLINE
from stem_jax.study.panels import panels_of
from stem_jax.study.prepared_text import PreparedText
from stem_jax.study.record import (
    check_config,
    config_of_record,
    for_code_of,
    one_commit,
    read_record,
    read_records,
)
from stem_jax.study.runs import MAIN, RATE, Phase, Run, chosen_rates, runs_of
from stem_jax.study.sizes import size_of
from stem_jax.study.study import Study
from stem_jax.study.text_notes import note_text
from stem_jax.study.texts import prepare_text
from stem_jax.study.workers import Workers

_FOLDERS = ("runs", "logs")
# Pairs after which it is known how wide an interval will be, and bits per byte that are too wide.
_PAIRS, _WIDEST = 3, 0.01


@dataclasses.dataclass(frozen=True)
class Places:
    """Folders. records: of this study. texts: prepared ones. workdir: for all else."""

    workdir: Path
    records: Path
    texts: Path


@dataclasses.dataclass
class Campaign:
    """A study, its phases and what there is of it.

    phases: those of the study that are asked for. records: of finished runs, by name.
    """

    study: Study
    phases: tuple[Phase, ...]
    places: Places
    mixed_code: bool
    say: Callable[[str], None]
    records: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    _texts: dict[str, PreparedText] = dataclasses.field(default_factory=dict)

    def read(self) -> None:
        """Reads the records, and compares them with what is asked.

        Raises:
            InputError: a record that cannot be taken, or a run's folder of another configuration.
        """
        self.records = read_records(self.places.records)
        one_commit(self.records.values(), self.mixed_code)
        for run in self.asked():
            config = self.study.config(run)
            if run.name in self.records:
                check_config(self.records[run.name], config)
            else:
                self._check_folder(run, config)

    def asked(self) -> list[Run]:
        """All runs, in order, once each; rates not chosen yet count as 1."""
        chosen = chosen_rates(list(self.records.values()))
        runs = [run for phase in self.phases for run in runs_of(self.study, phase, chosen)]
        return list({run.name: run for run in reversed(runs)}.values())[::-1]

    def missing(self) -> list[Run]:
        """Those of `asked` without a record."""
        return [run for run in self.asked() if run.name not in self.records]

    def train(self, workers: Workers, minutes: float | None) -> None:
        """Trains what is missing, phase by phase.

        Args:
            minutes: after which it stops; None: no limit.

        Raises:
            InputError: rates that were not chosen yet; a text that cannot be had.
            Stopped, TrainingError: see `Workers.run`.
        """
        if not self.missing():
            return
        deadline = None if minutes is None else time.monotonic() + 60 * minutes
        for folder in _FOLDERS:
            (self.places.workdir / folder).mkdir(parents=True, exist_ok=True)
        wanted = None if self.mixed_code else one_commit(self.records.values(), False)
        own, code = code_state.commit(), code_state.ROOT
        if wanted is not None and wanted != own:
            code, own = code_state.worktree(wanted, self.places.workdir / "code"), wanted
            self.say(f"training with the records' code, {code_state.short(wanted)}, in {code}")
        for phase in self.phases:
            self._check_chosen(phase)
            chosen = chosen_rates(list(self.records.values()))
            runs = {run.name: run for run in runs_of(self.study, phase, chosen)}
            jobs = [self._job(r, own) for n, r in runs.items() if n not in self.records]
            if code != code_state.ROOT:
                of_code = next(iter(self.records.values()))
                jobs = [{**job, "config": for_code_of(of_code, job["config"])} for job in jobs]
            if jobs:
                self.say(f"{phase.purpose}: {phase.says}: {len(jobs)} of {len(runs)} runs to make")
                workers.run(jobs, code, self._done, deadline)

    def _job(self, run: Run, commit: str) -> dict[str, Any]:
        places, text = self.places, self._text(run.text)
        config = json.loads(self.study.config(run).to_json())
        config["data"]["sources"] = str(text.store.resolve())
        return {
            "name": run.name,
            "run": run.record(),
            "commit": commit,
            "config": config,
            "workdir": str((places.workdir / "runs" / run.name).resolve()),
            "records": str(places.records.resolve()),
            "text": str((places.texts / run.text).resolve()),
            "compiled": str((places.workdir / "compiled").resolve()),
        }

    def _text(self, name: str) -> PreparedText:
        """A text; prepared, or read from end to end, once."""
        if name not in self._texts:
            size = self.study.texts[name].vocab_size
            self.say(f"text {name}: {self.places.texts / name}")
            text = prepare_text(name, self.places.texts / name, size)
            note_text(text, self.places.records)
            self._texts[name] = text
        return self._texts[name]

    def _done(self, job: dict[str, Any], seconds: float) -> None:
        record = read_record(self.places.records / f"{job['name']}.json")
        self.records[job["name"]] = record
        measures = record["measures"]
        bits = measures.get("test_bits_per_byte")
        how = "diverged" if record["diverged"] is not None else "measured"
        figure = how if bits is None else f"{bits:.4f} bits per byte"
        asked = self.asked()
        have = sum(run.name in self.records for run in asked)
        self.say(f"{have} of {len(asked)}: {job['name']}: {figure}, {seconds / 60:.1f} minutes")
        self._warn_of_width(record["run"])

    def _warn_of_width(self, run: dict[str, Any]) -> None:
        """After three pairs: whether all seeds will resolve a hundredth of a bit per byte."""
        phase = next((p for p in self.phases if p.purpose == run["purpose"] == MAIN), None)
        if phase is None or run["variant"] not in phase.variants[:2]:
            return
        panel = panels_of(self.records.values())[0]
        values, _ = panel.difference(phase.variants[1], self.study.baseline, HEADLINE)
        if len(values) == _PAIRS:
            width = half_width_to_come(list(values.values()), len(phase.seeds))
            if width is not None and width > _WIDEST:
                self.say(
                    f"after {_PAIRS} pairs the interval of {phase.variants[1]} will be "
                    f"+-{width:.3f} bits per byte: add seeds or tokens for less"
                )

    def _check_chosen(self, phase: Phase) -> None:
        """Refuses a phase that needs rates which the runs so far do not choose."""
        if phase.rates is not None:
            return
        rate_phases = [p for p in self.study.phases if p.purpose == RATE]
        trials = [run for p in rate_phases for run in runs_of(self.study, p, {})]
        for run in trials:
            needed = run.variant in (*phase.variants, self.study.baseline)
            if needed and run.name not in self.records:
                raise InputError(
                    f"phase {phase.purpose!r} needs the rate of {run.variant!r}, whose trial "
                    f"{run.name} has no record; ask for --phases={RATE},{phase.purpose}"
                )

    def _check_folder(self, run: Run, config: Config) -> None:
        """Refuses a run's folder that says another configuration than the study."""
        path = self.places.workdir / "runs" / run.name / "config.json"
        if not path.exists():
            return
        there, asked = read_json(path), config_of_record(config, run.text)
        for section, values in asked.items():
            for key, value in values.items():
                found = there.get(section, {}).get(key)
                if value is not None and key != "sources" and found != value:
                    raise InputError(
                        f"{path} says {section}.{key}={found!r}, the study asks for {value!r}: "
                        "the folder was changed, or belongs to another study; remove it, or give "
                        "another --workdir"
                    )


def cost_of(study: Study, runs: list[Run]) -> list[tuple[Run, float, float]]:
    """Of each run its training FLOPs, and the seconds that one worker is expected to take."""
    sizes: dict[tuple[str, str], float] = {}

    def flops(run: Run, variant: str) -> float:
        key = (variant, run.text)
        if key not in sizes:
            asked = dataclasses.replace(run, variant=variant)
            sizes[key] = size_of(study.config(asked))["flops_per_token"]
        return sizes[key]

    found = []
    for run in runs:
        own, base = flops(run, run.variant), flops(run, study.baseline)
        seconds = run.tokens / study.tokens_per_second * own / base
        found.append((run, own * run.tokens, seconds))
    return found


def locked(folder: Path, flag: str) -> Lock:
    """The lock of a study's folder, or of one of records.

    flag: that names it, for messages.

    Raises:
        InputError: another study is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock.take(folder / ".lock")
    if lock is None:
        raise InputError(
            f"{flag}={folder} is in use by {Lock.holder(folder / '.lock')}; wait for it, or "
            "give another folder"
        )
    return lock
