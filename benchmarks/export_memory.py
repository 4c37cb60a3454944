"""Peak memory and seconds of exports and imports, each in a process of its own.

python -m benchmarks.export_memory [--folder=DIR]

A model of 2.02 GB in float32, with optimizer state and rows that lag behind: D 1024, 12 layers,
F 3072, V 32000, three of them STEM. Takes up to 15 GB of disk and 14 GB of memory. "over idle" is
the peak over that of a process that imported the same program and did nothing; "private" leaves out
mapped files, which the system takes back when memory is short. Exits 1 if the export for
transformers takes more than 1.3 times the largest table, or if it or the import of what it wrote
has more than 700 MB of its own.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.children import environment

SHAPE = {
    "model.vocab_size": "32000",
    "model.embed_dim": "1024",
    "model.num_layers": "12",
    "model.num_heads": "16",
    "model.num_kv_heads": "8",
    "model.ffn_dim": "3072",
    "model.stem_layers": "2,5,8",
    "data.tokenizer": "bytes",
    "mesh.data": "1",
}
UPDATES = 100
TABLE_BYTES = 4 * 32000 * 3072
# Of the memory of an export for transformers over an idle process, by the largest table.
BOUND = 1.3
# Of each process, without its mapped files.
HELD_BYTES = 700e6
_ROOT = Path(__file__).parent.parent
_SAMPLE_SECONDS = 0.005


@dataclasses.dataclass(frozen=True)
class Usage:
    """Of a process: seconds it ran, its peak of resident and of private memory in bytes."""

    seconds: float
    resident: int
    private: int


def make_run(folder: Path) -> None:
    """Writes a work folder with random numbers in every array, for another process to read."""
    import jax
    import numpy as np

    from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
    from stem_jax.checkpoints.checkpointer import Checkpointer
    from stem_jax.config_file import load_config
    from stem_jax.data.tokenizer import load_tokenizer
    from stem_jax.mesh import make_mesh
    from stem_jax.training.state import init_state
    from stem_jax.training.step import TrainStep

    config = load_config(_ROOT / "configs" / "base.py", SHAPE)
    programs = TrainStep(config, make_mesh(config.mesh, jax.devices()[:1]))
    state = init_state(programs.blueprint)
    generator = np.random.default_rng(0)

    def filled(array):
        if array.dtype != np.float32:
            return array
        # Not negative: second moments are among them. Not compressible.
        values = generator.random(array.shape, np.float32)
        values *= 1e-2
        return jax.device_put(values, array.sharding)

    table = jax.tree.map(filled, state.tables["stem"])
    last_step = generator.integers(0, UPDATES, table.last_step.shape, np.int32)
    table = dataclasses.replace(table, last_step=jax.device_put(last_step))
    state = dataclasses.replace(
        state, tables={"stem": table}, opt_state=jax.tree.map(filled, state.opt_state)
    )
    tokenizer = load_tokenizer("bytes")
    tokenizer.save(folder / "tokenizer")
    info = CheckpointInfo(UPDATES, UPDATES, 0, {}, tokenizer.fingerprint, {}, config)
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(state, info, None)


def measure(*command: str) -> Usage:
    """Runs Python with these arguments."""
    begin, resident, private = time.perf_counter(), 0, 0
    # Not a pipe: nothing reads it meanwhile, and a full one would stop the process.
    with tempfile.TemporaryFile("w+") as errors:
        process = psutil.Popen(
            [sys.executable, *command],
            cwd=_ROOT,
            env=environment(JAX_PLATFORMS="cpu"),
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        while process.poll() is None:
            found = _status(process.pid)
            resident = max(resident, found.get("VmHWM", 0))
            private = max(private, found.get("RssAnon", 0))
            time.sleep(_SAMPLE_SECONDS)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed: {errors.read()[-2000:]}")
    return Usage(time.perf_counter() - begin, resident, private)


def _status(pid: int) -> dict[str, int]:
    """The sizes in /proc/PID/status, in bytes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = (line.split() for line in lines)
    return {field[0][:-1]: 1024 * int(field[1]) for field in fields if field[-1] == "kB"}


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Runs the benchmark and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", help="for the files; without it, a temporary folder")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make_run(args.make)
        return
    usages, sizes = {}, {}
    for program in ("export", "import_torch"):
        usages[f"idle {program}"] = measure("-c", f"import jax, stem_jax.{program}; jax.devices()")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run, out, again = (Path(folder) / name for name in ("run", "out", "again"))
        usages["make the run"] = measure("-m", "benchmarks.export_memory", f"--make={run}")
        sizes["make the run"] = _bytes_of(run)
        for kind in ("hf", "official"):
            flags = (f"--workdir={run}", f"--format={kind}", f"--out={out}")
            usages[f"export {kind}"] = measure("-m", "stem_jax.export", *flags)
            sizes[f"export {kind}"] = _bytes_of(out)
            flags = (f"--from={kind}", f"--path={out}", f"--workdir={again}")
            usages[f"import {kind}"] = measure("-m", "stem_jax.import_torch", *flags)
            sizes[f"import {kind}"] = _bytes_of(again)
            shutil.rmtree(out)
            shutil.rmtree(again)
    print("process              seconds  peak MB  private MB  over idle MB  written MB")
    for name, usage in usages.items():
        idle = usages["idle import_torch" if name.startswith("import") else "idle export"]
        over = usage.resident - idle.resident
        numbers = [usage.resident, usage.private, over, sizes.get(name, 0)]
        columns = "".join(
            f"{number / 1e6:{width}.0f}" for number, width in zip(numbers, (9, 12, 14, 12))
        )
        print(f"{name:<20}{usage.seconds:>8.1f}{columns}")
    over = usages["export hf"].resident - usages["idle export"].resident
    verdict = {
        "largest_table_mb": round(TABLE_BYTES / 1e6),
        "hf_export_over_idle_over_largest_table": round(over / TABLE_BYTES, 2),
        "bound": BOUND,
        "hf_private_over_700_mb": [
            round(usages[f"{kind} hf"].private / HELD_BYTES, 2) for kind in ("export", "import")
        ],
    }
    print(json.dumps(verdict))
    if over > BOUND * TABLE_BYTES or max(verdict["hf_private_over_700_mb"]) > 1:
        sys.exit(1)


if __name__ == "__main__":
    main()
