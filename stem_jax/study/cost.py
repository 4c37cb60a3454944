"""What variants cost in time and memory: apart from training, alone on the machine, in turns."""

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from stem_jax.study.machine import cpu_model
from stem_jax.study.runs import Run
from stem_jax.study.study import Study
from stem_jax.study.texts import prepare_text
from stem_jax.study.timed_step import TimedStep

ROUNDS = 20


def cost_of_variants(study: Study, texts: Path, rounds: int = ROUNDS) -> dict[str, Any]:
    """Times of the variants of the study's main runs, interleaved, on this machine's cores.

    Args:
        texts: folder of prepared texts.

    Returns:
        "machine", "rounds", and by variant "tokens_per_second" (median), "time_ratio" to the
        baseline (median and what 90% of the rounds lie between; > 1 is slower) and "state_bytes".
        Of hash layers on CPUs no times: they take a path there that is none of accelerators'.
    """
    phases = [phase for phase in study.phases if phase.compares] or list(study.phases)
    names = list(dict.fromkeys(name for phase in phases for name in phase.variants))
    text = phases[0].text
    store = prepare_text(text, texts / text, study.texts[text].vocab_size).store
    steps = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            run = Run(study.name, "cost", name, text, study.tokens, 1.0, 0)
            config = study.config(run)
            data = dataclasses.replace(config.data, sources=str(store))
            config = dataclasses.replace(config, data=data)
            steps[name] = TimedStep(config, Path(folder) / name)
    timed = {n: s for n, s in steps.items() if not _unlike_accelerators(s)}
    seconds = _in_turns(timed, rounds)
    tokens = steps[names[0]].config.tokens_per_step
    return {
        "machine": {
            "cpu": cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
        },
        "rounds": rounds,
        "variants": {
            name: {
                "tokens_per_second": _median_rate(tokens, seconds.get(name)),
                "time_ratio": _ratio(seconds.get(name), seconds.get(study.baseline)),
                "state_bytes": step.state_bytes,
            }
            for name, step in steps.items()
        },
    }


def _unlike_accelerators(step: TimedStep) -> bool:
    return bool(step.config.model.hash_moe_layers) and jax.default_backend() == "cpu"


def _in_turns(calls: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _median_rate(tokens: int, seconds: Sequence[float] | None) -> float | None:
    return None if seconds is None else tokens / statistics.median(seconds)


def _ratio(own: Sequence[float] | None, base: Sequence[float] | None) -> list[float] | None:
    if own is None or base is None:
        return None
    ratios = [a / b for a, b in zip(own, base, strict=True)]
    twentieths = statistics.quantiles(ratios, n=20, method="inclusive")
    return [statistics.median(ratios), twentieths[0], twentieths[-1]]
