"""What variants cost in time and memory: apart from training, alone on the machine, in turns."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from stem_jax.config import Config
from stem_jax.errors import TrainingError
from stem_jax.kept_memory import LARGE_PAGES
from stem_jax.study.runs import Run
from stem_jax.study.study import Study
from stem_jax.study.texts import prepare_text

ROUNDS = 20
# Enough for the most memory that a step takes.
_FEW = 3


def compared(study: Study) -> list[str]:
    """The variants that all are compared with each other, in order."""
    phases = [phase for phase in study.phases if phase.compares] or list(study.phases)
    return list(dict.fromkeys(name for phase in phases for name in phase.variants))


def cost_of_variants(study: Study, texts: Path, rounds: int = ROUNDS) -> dict[str, Any]:
    """Times in turns, in one process; then the memory of each variant in a process of its own.

    Args:
        texts: folder of prepared texts.

    Returns:
        "machine", "rounds", and by variant "tokens_per_second" (median), "time_ratio" to the
        baseline (median and what 90% of the rounds lie between; > 1 is slower), "state_bytes" of
        parameters, rows and moments, "peak_bytes" of a process that trains. Hash layers have no
        times: on CPUs they take a path that is none of accelerators'.

    Raises:
        TrainingError: a process failed.
    """
    text = next(phase for phase in study.phases if phase.variants).text
    store = prepare_text(text, texts / text, study.texts[text].vocab_size).store
    configs = {}
    for name in compared(study):
        run = Run(study.name, "cost", name, text, study.tokens, 1.0, 0)
        configs[name] = _reading(study.config(run), store)
    timed = {n: c for n, c in configs.items() if c["model"]["hash_moe_layers"] == "none"}
    found = _job(study, timed, rounds)
    for name, config in configs.items():
        alone = _job(study, {name: config}, _FEW)["variants"][name]
        kept = {key: alone[key] for key in ("state_bytes", "peak_bytes")}
        no_times = {"tokens_per_second": None, "time_ratio": None}
        found["variants"][name] = found["variants"].get(name, no_times) | kept
    found["variants"] = {name: found["variants"][name] for name in configs}
    return {**found, "rounds": rounds}


def _reading(config: Config, store: Path) -> dict[str, Any]:
    raw = json.loads(config.to_json())
    raw["data"]["sources"] = str(store.resolve())
    return raw


def _job(study: Study, configs: dict[str, Any], rounds: int) -> dict[str, Any]:
    job = {"configs": configs, "baseline": study.baseline, "rounds": rounds}
    done = subprocess.run(
        [sys.executable, "-m", "stem_jax.study.cost_job"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env={**os.environ, **LARGE_PAGES},
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise TrainingError(f"the cost of {', '.join(configs)} could not be measured: {why[:300]}")
    return json.loads(done.stdout)
