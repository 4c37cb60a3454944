"""What one GPU is measured with, in order of worth, in ten minutes at most.

python -m benchmarks.gpu FOLDER [--only=checks,shapes_350m] [--dry-run]

Each item is a process of its own with a limit of its own; one that fails or takes too long is
named, and the next one runs. All share a cache of compiled programs, in FOLDER/cache.
FOLDER/ITEM.json has what an item printed, FOLDER/summary.json all of them, and FOLDER/rows.md their
figures as a table. `--dry-run` makes each item as small as it can be, for any device.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_TINY = """
--config=configs/tiny.py --config.model.num_layers=2 --config.model.embed_dim=64
--config.model.num_heads=2 --config.model.num_kv_heads=1 --config.model.ffn_dim=96
--config.model.vocab_size=300 --config.data.sources=facts --config.data.tokenizer=bytes
--config.train.seq_len=64 --config.train.sample_prompt= --config.eval.every=0
--config.eval.baselines=False
"""
_TOY = {
    "checks": "--shape=toy --steps=2",
    "attention": "--batch=1 --length=128 --heads=2 --kv-heads=1 --rounds=1",
    "attention_4096": "--batch=1 --length=256 --heads=2 --kv-heads=1 --rounds=1",
    "shapes_350m": "--shape=toy --patterns=half --rounds=1 --steps=1",
    "shapes_1b": "--shape=toy --rounds=1 --steps=1",
    "offload_1b": "--shape=toy --resident=0.25 --rounds=1 --steps=1 --contestants=prefetch",
    "offload_350m": "--shape=toy --resident=0.25 --rounds=1 --steps=1",
    "decode": "--shape=toy --rounds=1",
    "profile": f"{_TINY} --config.train.steps=6 --config.train.profile_steps=3-4",
    "plan_350m": f"{_TINY} --topology=cpu:1",
}
# Of all items together; what comes too late is not begun.
_SECONDS = 600
# Dry runs are about what works, on machines that may be slow.
_PATIENCE = 10


@dataclasses.dataclass(frozen=True)
class Item:
    """seconds: after which it is stopped. module, flags: the command. prints: whether JSON."""

    name: str
    seconds: int
    module: str
    flags: str
    prints: bool = True


def items(memory_mib: int) -> list[Item]:
    """What fits a GPU of this memory, the most telling first."""
    # Dense and STEM side by side need 98 GB with all five tables of the 1B shape.
    layers = "1,4,7,10,13" if memory_mib >= 130_000 else "1,4"
    one = "--config.train.global_batch_size=16 --config.train.micro_batches=1"
    return [
        Item("checks", 70, "benchmarks.gpu_checks", ""),
        Item("attention", 40, "benchmarks.attention", ""),
        Item(
            "attention_4096",
            40,
            "benchmarks.attention",
            "--batch=8 --length=4096 --heads=32 --kv-heads=8",
        ),
        Item("shapes_350m", 130, "benchmarks.shapes", "--shape=350m --patterns=third,half"),
        Item("shapes_1b", 120, "benchmarks.shapes", f"--shape=1b --patterns={layers} --rounds=3"),
        # With its moments the table has 63 GB, which host memory holds.
        Item(
            "offload_1b",
            120,
            "benchmarks.offload",
            "--shape=1b --stem-layers=third --resident=0.25 --contestants=prefetch --rounds=2",
        ),
        # A quarter of the rows is less than one batch names.
        Item(
            "offload_350m",
            120,
            "benchmarks.offload",
            "--shape=350m --resident=0.4 --rounds=2 --steps=4",
        ),
        Item("decode", 60, "benchmarks.decode", ""),
        Item(
            "profile",
            60,
            "stem_jax.train",
            "--config=configs/tiny.py --config.model.compute_dtype=bfloat16 "
            "--config.train.steps=40 --config.train.profile_steps=20-22",
            prints=False,
        ),
        Item(
            "plan_350m",
            120,
            "stem_jax.plan",
            f"--config=configs/stem_350m.py --topology=h100:1 --json {one}",
        ),
    ]


def run_item(item: Item, folder: Path, dry_run: bool, left: float) -> dict[str, Any]:
    """Runs an item to its end, its limit, or for the seconds that are left.

    Returns:
        `status` (ok, failed, out of time, not begun), `seconds`, and `result`, the JSON that it
        printed.
    """
    if left <= 0:
        (folder / f"{item.name}.err").write_text("no time was left\n")
        return {"status": "not begun", "seconds": 0.0}
    flags = (_TOY[item.name] if dry_run else item.flags).split()
    if item.module == "stem_jax.train":
        flags.append(f"--workdir={folder / item.name}")
    elif item.module == "stem_jax.plan" and "--json" not in flags:
        flags.append("--json")
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
    }
    if dry_run:
        # Programs are small, and how fast they are is not asked.
        cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        cache |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    out, errors = folder / f"{item.name}.json", folder / f"{item.name}.err"
    limit = min(left, item.seconds * (_PATIENCE if dry_run else 1))
    start = time.monotonic()
    with open(out, "w") as stdout, open(errors, "w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", item.module, *flags],
            stdout=stdout,
            stderr=stderr,
            env=os.environ | cache,
            start_new_session=True,
        )
        try:
            status = "ok" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
            # What it has started goes with it.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = {"status": status, "seconds": round(time.monotonic() - start, 1)}
    if item.prints and status == "ok":
        found["result"] = json.loads(out.read_text())
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """The numbers of all items as a Markdown table."""
    lines = ["| item | figure | value |", "|---|---|---|"]
    for name, outcome in found.items():
        lines.append(f"| {name} | {outcome['status']} | {outcome['seconds']} s |")
        lines += [f"| {name} | {key} | {value} |" for key, value in _leaves(outcome.get("result"))]
    return "\n".join(lines) + "\n"


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [
            leaf
            for key, inner in value.items()
            for leaf in _leaves(inner, f"{path}.{key}" if path else str(key))
        ]
    return [(path, value)] if isinstance(value, int | float | str) else []


def _memory_mib() -> int:
    """Of the first GPU; 0 without one."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(query, capture_output=True, text=True).stdout.split()[0])
    except (FileNotFoundError, IndexError):
        return 0


def main() -> None:
    """Runs the items and tells of each as it ends; exits with 1 if any did not end well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", help="names of items, separated by commas")
    parser.add_argument("--dry-run", action="store_true", help="as small as can be, on any device")
    args = parser.parse_args()
    every = items(_memory_mib())
    wanted = [item.name for item in every] if args.only is None else args.only.split(",")
    if unknown := set(wanted) - {item.name for item in every}:
        parser.error(f"--only={','.join(sorted(unknown))}: known are {[i.name for i in every]}")
    args.folder.mkdir(parents=True, exist_ok=True)
    folder = args.folder.resolve()
    found = {}
    end = time.monotonic() + _SECONDS * (_PATIENCE if args.dry_run else 1)
    for item in every:
        if item.name not in wanted:
            continue
        found[item.name] = run_item(item, folder, args.dry_run, end - time.monotonic())
        # After each, so that what was measured is there whatever ends this.
        (folder / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
        (folder / "rows.md").write_text(table(found))
        outcome = found[item.name]
        print(f"== {item.name}: {outcome['status']} after {outcome['seconds']} s", flush=True)
        if outcome["status"] != "ok":
            last = (folder / f"{item.name}.err").read_text(errors="replace").splitlines()[-8:]
            print("\n".join(line[:400] for line in last), flush=True)
    sys.exit(int(any(outcome["status"] != "ok" for outcome in found.values())))


if __name__ == "__main__":
    main()
