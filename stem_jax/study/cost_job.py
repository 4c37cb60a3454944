"""Steps of variants, timed in turns in a process of their own.

python -m stem_jax.study.cost_job < JOB.json > COST.json

The parent says everything in a JSON object on standard input: `configs` by name, `baseline`,
`rounds`. One configuration alone tells the memory that its process took at most.
"""

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stem_jax import cli


def main(argv: list[str]) -> None:
    """Does the job and prints what it found."""
    job = json.load(sys.stdin)
    from stem_jax.jax_start import start_jax

    start_jax()
    print(json.dumps(_cost(job)))


def _cost(job: dict[str, Any]) -> dict[str, Any]:
    import jax

    from stem_jax.config_file import config_from_json
    from stem_jax.study.machine import cpu_model
    from stem_jax.study.timed_step import TimedStep

    steps = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in job["configs"].items():
            steps[name] = TimedStep(config_from_json(json.dumps(config)), Path(folder) / name)
    seconds = _in_turns(steps, job["rounds"])
    base = seconds.get(job["baseline"])
    # Of a process that had other steps before, it says nothing.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if len(steps) == 1 else None
    return {
        "machine": {
            "cpu": cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        },
        "variants": {
            name: {
                "tokens_per_second": step.config.tokens_per_step / statistics.median(seconds[name]),
                "time_ratio": None if base is None else _ratio(seconds[name], base),
                "state_bytes": step.state_bytes,
                "peak_bytes": peak,
            }
            for name, step in steps.items()
        },
    }


def _in_turns(calls: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _ratio(own: Sequence[float], base: Sequence[float]) -> list[float]:
    """The median over rounds, and what 90% of them lie between."""
    ratios = [a / b for a, b in zip(own, base, strict=True)]
    twentieths = statistics.quantiles(ratios, n=20, method="inclusive")
    return [statistics.median(ratios), twentieths[0], twentieths[-1]]


if __name__ == "__main__":
    cli.run(main)
