"""A training step of the 350M and 1B shapes on one device, dense against STEM, interleaved.

python -m benchmarks.shapes [--shape=350m|1b] [--patterns=third,half] [--rounds=5]

The shipped configurations with 32k tokens a step and no accumulation; `--patterns` are choices of
STEM layers, or the numbers of some, which fits the 1B tables to the memory there is. Each
contestant makes `--steps` steps a turn, after one that compiles.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time

import jax

from benchmarks.interleave import interleave, speed_ratio
from benchmarks.offload import shape_config
from benchmarks.train_step import JaxStep
from stem_jax.config import Config
from stem_jax.hardware import chip_of
from stem_jax.model.cost import training_flops_per_token


def contestants(shape: str, patterns: str | None) -> dict[str, Config]:
    """Dense and STEM of a shape; STEM by pattern, where several are named."""
    config = shape_config(shape, None)
    dense = dataclasses.replace(config.model, stem_layers=())
    found = {"dense": dataclasses.replace(config, model=dense)}
    if patterns is None:
        return found | {"stem": config}
    if patterns.replace(",", "").isdigit():
        return found | {"stem": shape_config(shape, patterns)}
    return found | {name: shape_config(shape, name) for name in patterns.split(",")}


def main() -> None:
    """Runs the benchmark and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("toy", "cpu", "350m", "1b"), default="350m")
    parser.add_argument("--patterns", help="of STEM layers; default: the shape's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="of each contestant and round")
    args = parser.parse_args()
    configs = contestants(args.shape, args.patterns)
    compile_seconds = {}
    runs = {}
    for name, config in configs.items():
        start = time.perf_counter()
        step = JaxStep(config)
        step()
        compile_seconds[name] = round(time.perf_counter() - start, 1)
        print(f"{name}: first step {compile_seconds[name]} s", file=sys.stderr, flush=True)

        def turn(step=step) -> None:
            for _ in range(args.steps):
                step()

        runs[name] = turn
    seconds = interleave(runs, args.rounds)
    chip = chip_of(jax.devices()[0])
    result = {"shape": args.shape, "tokens_per_step": configs["dense"].tokens_per_step}
    for name, config in configs.items():
        step_seconds = statistics.median(seconds[name]) / args.steps
        rate = config.tokens_per_step / step_seconds
        flops = rate * training_flops_per_token(config, config.train.seq_len)
        result[name] = {
            "step_ms": round(1e3 * step_seconds, 2),
            "tokens_per_second": round(rate),
            "mfu": None if chip is None else round(flops / chip.peak(config.model.matmul_dtype), 4),
            "first_step_seconds": compile_seconds[name],
            "stem_layers": config.model.stem_layers,
        }
        if name != "dense":
            result[name]["over_dense"] = round(speed_ratio(seconds, name, "dense"), 4)
    result |= {
        "memory_gib": _peak_gib(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    print(json.dumps(result, indent=2))


def _peak_gib() -> float | None:
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else round(stats["peak_bytes_in_use"] / 2**30, 2)


if __name__ == "__main__":
    main()
