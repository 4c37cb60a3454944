"""How long a save keeps the loop from its next step, and how it slows the steps it runs beside.

python -m benchmarks.save [--rounds=5] [--stem-layers=half]

The model of benchmarks.train_step. A round is a step alone, a save, and steps until it is on disk.
"""

import argparse
import json
import platform
import statistics
import tempfile
import threading
import time

import jax

from benchmarks.train_step import JaxStep, bench_config
from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer


def main() -> None:
    """Runs the benchmark and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stem-layers", default="half")
    parser.add_argument("--folder", help="where to save; without it, a temporary folder")
    args = parser.parse_args()
    step = JaxStep(bench_config(model__stem_layers=args.stem_layers))
    step()
    alone, blocked, beside, on_disk = [], [], [], []
    with (
        tempfile.TemporaryDirectory(dir=args.folder) as folder,
        Checkpointer(folder, keep=1) as checkpoints,
    ):
        for number in range(1, args.rounds + 1):
            alone.append(_seconds(step))
            started = time.perf_counter()
            checkpoints.save(step.state, _info(step, number), None)
            blocked.append(time.perf_counter() - started)
            waiting = threading.Thread(target=checkpoints.wait)
            waiting.start()
            slowed = []
            while waiting.is_alive():
                slowed.append(_seconds(step))
            on_disk.append(time.perf_counter() - started)
            beside.append(statistics.median(slowed))
    pairs = list(zip(blocked, alone, strict=True))
    result = {
        "state_gib": round(sum(leaf.nbytes for leaf in jax.tree.leaves(step.state)) / 2**30, 2),
        "step_seconds": round(statistics.median(alone), 2),
        "blocked_seconds": round(statistics.median(blocked), 3),
        "blocked_share_of_step": round(statistics.median(b / a for b, a in pairs), 3),
        "blocked_share_at_most": round(max(b / a for b, a in pairs), 3),
        "step_beside_a_save_over_alone": round(
            statistics.median(b / a for b, a in zip(beside, alone, strict=True)), 2
        ),
        "on_disk_seconds": round(statistics.median(on_disk), 1),
        "rounds": args.rounds,
        "device": jax.devices()[0].device_kind,
        "machine": platform.processor() or platform.machine(),
        "jax": jax.__version__,
    }
    print(json.dumps(result, indent=2))


def _info(step: JaxStep, number: int) -> CheckpointInfo:
    config = step.programs.config
    counters = {"updates": number, "bad_steps": 0, "touched_rows": {}}
    return CheckpointInfo(step=number, **counters, tokenizer="none", data={}, config=config)


def _seconds(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
