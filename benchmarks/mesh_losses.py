"""How far losses of two meshes lie apart, over seeds; and what the gate of `engram` makes of it.

python -m benchmarks.mesh_losses [--seeds=6] [--memories=ngram] [--formats=float32] [--no-root]

The runs of `benchmarks.memories` with all rows resident, step by step in one process: one device
against (8) and (2, 2, 2), which sum gradients in other orders, so that parameters are one unit of
their last place apart after the first updates. The gate of Engram as published,
sigmoid(sign(r) sqrt(max(|r|, 1e-6))), has a slope of up to 500 where r is near zero: there the
gradient of a token has little to do with that of another mesh, and where r changes its sign the
gate leaps. With --no-root the gate is sigmoid(r), to see what would be without that.
"""

import os

# Before JAX is imported.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import argparse
import dataclasses
import logging
import math
import tempfile
from pathlib import Path

import jax
import numpy as np

from benchmarks.memories import FORMATS, MEMORIES, MESHES, Runs
from benchmarks.seeds import markdown
from stem_jax.memory.catalogue import with_eos
from stem_jax.mesh import make_mesh
from stem_jax.model import engram
from stem_jax.training.blueprint import Blueprint
from stem_jax.training.run_data import open_run_data
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import init_state
from stem_jax.training.step import TrainStep


def losses(runs: Runs, memory: str, form: str, mesh: tuple[int, ...], seeds: int) -> np.ndarray:
    """The training losses [seeds, steps] of runs that differ in parameters and batches."""
    config = runs.config(memory, runs.keys(memory, form, mesh, "resident"))
    with tempfile.TemporaryDirectory() as folder:
        data = open_run_data(config, Path(folder))
        config = with_eos(config, data.tokenizer.special.eos_id)
        devices = make_mesh(config.mesh, jax.devices()[: math.prod(mesh)])
        programs, found = TrainStep(config, devices), np.empty((seeds, runs.steps))
        schedule = make_schedule(config, runs.steps, mesh=devices)
        for seed in range(seeds):
            train = dataclasses.replace(config.train, seed=seed)
            state = init_state(Blueprint(dataclasses.replace(config, train=train), devices))
            with data.batches.iterate(seed * runs.steps) as batches:
                for step in range(runs.steps):
                    batch = programs.place(next(batches))
                    state, metrics = programs.update(state, batch, schedule)
                    # Waited for: programs in flight would wait for each other's threads.
                    found[seed, step] = float(metrics["loss"])
    return found


def main() -> None:
    """Prints a table: of each seed, the largest difference of a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--memories", default=",".join(MEMORIES))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--no-root", action="store_true", help="another gate than published")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("absl").setLevel(logging.ERROR)
    if args.no_root:
        engram._gate = jax.nn.sigmoid
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), args.steps)
        runs.prepare()
        for memory in args.memories.split(","):
            for form in args.formats.split(","):
                first, *others = (losses(runs, memory, form, m, args.seeds) for m in MESHES)
                for mesh, found in zip(MESHES[1:], others, strict=True):
                    apart = np.abs(found - first).max(1)
                    lines.append([memory, form, str(mesh), *(f"{worst:.1e}" for worst in apart)])
                    print(*lines[-1], flush=True)
    print(markdown(["memory", "rows", "mesh", *map(str, range(args.seeds))], lines))


if __name__ == "__main__":
    main()
