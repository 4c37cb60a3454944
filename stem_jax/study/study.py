"""A study as its file describes it: base, variants, texts, and which runs are made in what order.

A study file is a Python file with `get_study()`, which returns a dict with the keys of `Study`
but variants; its base is a ConfigDict as `get_config()` returns it. See configs/study/core.py.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from stem_jax.config import Config
from stem_jax.config_file import build
from stem_jax.config_program import found_program, run_program
from stem_jax.errors import InputError
from stem_jax.study.runs import Phase, Run
from stem_jax.study.study_file import read_study
from stem_jax.study.variants import Variant, load_variant

# What all variants share: text and its order, batches, evaluation, length.
_SHARED_SECTIONS = ("data", "train", "eval", "checkpoint", "mesh")
_SHARED_KEYS = ("model.vocab_size", "optimizer.learning_rate")
# Of each run, whatever its length.
_VALIDATIONS, _SAVES = 4, 4


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """vocab_size: tokens of its tokenizer. keys: {"section.name": value} of runs that read it."""

    vocab_size: int
    keys: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Study:
    """What is to be trained.

    name: of the study, in records.
    base: nested plain values of the configuration that variants change, as a config file's.
    tokens: N, positions that a run of full length trains on.
    texts: by name, what `texts.prepare_text` prepares.
    phases: in the order in which they run.
    baseline: the variant that others are compared with.
    claims: the file that holds what is claimed, a path or a name in configs/study; None: nothing.
    tokens_per_second: of the baseline on one core, as measured; for estimates alone.
    minutes: after which no run is begun; None: no limit.
    variants: by name.
    """

    name: str
    base: dict[str, dict[str, Any]]
    tokens: int
    texts: dict[str, TextSettings]
    phases: tuple[Phase, ...]
    baseline: str
    claims: str | None
    tokens_per_second: float
    minutes: float | None
    variants: dict[str, Variant]

    def config(self, run: Run) -> Config:
        """The configuration of a run, but for the folders of its text.

        Raises:
            InputError: a variant changes what all must share, or makes no configuration.
        """
        shared = self._raw(run)
        config = self.variants[run.variant].config_of(config_dict.ConfigDict(shared))
        base = build(shared)
        for key in _shared_keys(shared):
            shared_value, own = base.value_of(key), config.value_of(key)
            if shared_value != own:
                raise InputError(
                    f"variant {run.variant!r} sets {key}={own!r}, which all variants of a study "
                    f"share ({shared_value!r}); change the study's base, or leave it out"
                )
        return config

    def tokens_of(self, share: float, text: str) -> int:
        """Positions of a run of a share of the full length: whole batches."""
        train = {**self.base["train"], **_section(self.texts[text].keys, "train")}
        batch = train["global_batch_size"] * train["seq_len"]
        return max(round(self.tokens * share / batch), 1) * batch

    def _raw(self, run: Run) -> dict[str, dict[str, Any]]:
        raw = {section: dict(values) for section, values in self.base.items()}
        text = self.texts[run.text]
        raw["model"]["vocab_size"] = text.vocab_size
        for key, value in text.keys.items():
            section, _, field = key.partition(".")
            if field not in raw.get(section, {}):
                raise InputError(
                    f"text {run.text!r} sets {key}, which is no key; configs/base.py lists them"
                )
            raw[section][field] = value
        train = raw["train"]
        train["seed"] = run.seed
        train["steps"] = run.tokens // (train["global_batch_size"] * train["seq_len"])
        raw["optimizer"]["learning_rate"] *= run.rate
        # A short run is not mostly warm-up, and is validated as often as a long one.
        raw["optimizer"]["warmup_steps"] = min(
            raw["optimizer"]["warmup_steps"], train["steps"] // 10
        )
        raw["eval"]["every"] = math.ceil(train["steps"] / _VALIDATIONS)
        raw["checkpoint"]["every"] = math.ceil(train["steps"] / _SAVES)
        return raw


def load_study(path: Path, variant_files: Sequence[str] = ()) -> Study:
    """Reads a study file; a user's variants are trained wherever the baseline is.

    Args:
        path: the file.
        variant_files: paths of users' variants.

    Raises:
        InputError: no such file, a key that is missing or unknown, or a variant that is none.
    """
    path = found_program(path, "study", "--config=", "study")
    raw = run_program(path, "study", read_study)
    own = {variant.name: variant for variant in map(load_variant, variant_files)}
    phases = tuple(_with_users(Phase(**phase), raw["baseline"], own) for phase in raw["phases"])
    used = {name: None for phase in phases for name in phase.variants}
    shipped = {name: load_variant(name) for name in used if name not in own}
    texts = {name: TextSettings(**settings) for name, settings in raw["texts"].items()}
    rest = {"phases": phases, "texts": texts, "variants": shipped | own}
    return Study(**{**raw, **rest, "base": raw["base"].to_dict()})


def phases_named(study: Study, purposes: Sequence[str]) -> tuple[Phase, ...]:
    """Phases of a study by their purposes, in the study's order; without any, all.

    Raises:
        InputError: a purpose that no phase has.
    """
    known = [phase.purpose for phase in study.phases]
    for purpose in purposes:
        if purpose not in known:
            raise InputError(f"--phases={purpose} is none of {', '.join(known)}")
    return tuple(p for p in study.phases if not purposes or p.purpose in purposes)


def _with_users(phase: Phase, baseline: str, own: dict[str, Variant]) -> Phase:
    """The phase with users' variants, where all variants of the study are compared."""
    if not own or not phase.compares or baseline not in phase.variants:
        return phase
    more = [name for name in own if name not in phase.variants]
    return dataclasses.replace(phase, variants=(*phase.variants, *more))


def _shared_keys(raw: dict[str, dict[str, Any]]) -> list[str]:
    keys = [f"{section}.{name}" for section in _SHARED_SECTIONS for name in raw[section]]
    return [*keys, *_SHARED_KEYS]


def _section(keys: dict[str, Any], section: str) -> dict[str, Any]:
    return {k.partition(".")[2]: v for k, v in keys.items() if k.partition(".")[0] == section}
