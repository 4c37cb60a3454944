"""Runs of every memory, with rows in host memory, on meshes, in processes, and killed: one result.

python -m benchmarks.memories [--steps=60] [--memories=ngram] [--formats=float32] [--meshes=2,2,2]

Real text (the built-in pydoc) at D 32 and two layers. Within a mesh, runs with all rows on the
devices and with a share of them (half of the rows of tokens, a tenth of those of n-grams), waiting
for rows and looking two batches ahead, with the others in host memory or most of them on disk, end
with the same losses, parameters, rows and moments, bit for bit; so does a run that was killed (kill
-9) and goes on. So do one and two processes of the launcher, whose sums gloo makes; meshes, and a
process without it, add in other orders, and their losses are as far apart as is printed, of the
bars below. Exits with 1 where any of this does not hold.

The reader `engram` misses the bar between meshes: its gate is published with a root whose slope has
no end, see `mesh_losses`.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from benchmarks.saved_state import losses, saved_arrays
from stem_jax import run
from stem_jax.compilation_cache import keep_programs
from stem_jax.config_file import load_config
from stem_jax.memory.catalogue import table_specs, with_eos

ROOT = Path(__file__).parent.parent
MESHES = ((1, 1, 1), (8, 1, 1), (2, 2, 2))
_SIZES = {
    "model.vocab_size": 2048,
    "model.embed_dim": 32,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.ffn_dim": 64,
    # Large enough that AdamW does not turn rounding errors of tiny gradients into whole steps.
    "optimizer.epsilon": 1e-5,
    "optimizer.learning_rate": 1e-3,
    "train.global_batch_size": 8,
    "train.seq_len": 64,
    "train.log_every": 1,
    "train.sample_prompt": "",
    "eval.every": 20,
    "eval.max_batches": 2,
    "eval.baselines": False,
}
_NGRAMS = {"ngram.heads": 2, "ngram.keys_per_head": 50_000, "ngram.width": 32}
MEMORIES = {
    "value": ("value_tiny", {"value.layers": "all"}),
    "per_layer": ("per_layer_tiny", {}),
    "ngram": ("ngram_tiny", {"ngram.layers": "all", **_NGRAMS}),
    # Rows as wide as the values of both KV heads.
    "ngram to values": (
        "ngram_tiny",
        {"ngram.layers": "all", **_NGRAMS, "ngram.reader": "value", "ngram.width": 16},
    ),
    "stem + ngram": ("ngram_tiny", {"model.stem_layers": "1", "ngram.layers": "0", **_NGRAMS}),
}
FORMATS = {
    "float32": {},
    "bfloat16": {"tables.row_format": "bfloat16"},
    "rowwise": {"tables.row_format": "bfloat16", "tables.moments": "rowwise"},
}
# Where rows lie: the batches that are looked ahead, where not all are resident; or, looking two
# ahead, half as many in host memory as on the devices and the others on disk.
PLACES = ("resident", "0", "2", "disk")
PROCESSES_MESH = (8, 1, 1)
# Losses apart, between meshes and libraries that add, and between two processes and one.
OF_SUMS = 1e-5
OF_PROCESSES = {"float32": 1e-6, "bfloat16": 1e-5, "rowwise": 1e-5}
# Of the rows: of a token's keys, and of an n-gram's.
_SHARES = {"tables": 2, "value": 2, "per_layer": 2, "ngram": 10}
_SECTION = {"stem": "tables"}
# Rows over all shards divide by it.
_SHARDS = 8


class Runs:
    """Runs below a folder: the same text and the same compiled programs for all of them."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps = folder, steps

        # Programs, of which runs that differ in where rows lie have many in common.
        self.compiled = folder / "compiled"
        # Steps between checkpoints.
        self.every = steps // 3

    def prepare(self) -> None:
        """The text that all read."""
        flags = ["--corpus=pydoc", "--vocab-size=2048", f"--out={self.folder / 'text'}"]
        _finish([sys.executable, "-m", "stem_jax.prepare", *flags])

    def keys(
        self, memory: str, form: str, mesh: tuple[int, ...], place: str, kind: str = "plain"
    ) -> dict[str, str]:
        """The keys of one run. place: one of `PLACES`. kind: each has a disk of its own."""
        axes = ("mesh.data", "mesh.fsdp", "mesh.tensor")
        keys = _SIZES | MEMORIES[memory][1] | FORMATS[form] | dict(zip(axes, mesh, strict=True))
        keys |= {
            "data.sources": self.folder / "text",
            "train.steps": self.steps,
            "train.compilation_cache": self.compiled,
            "checkpoint.every": self.every,
        }
        if place != PLACES[0]:
            keys["tables.prefetch"] = "2" if place == "disk" else place
            resident = self._resident_rows(memory)
            keys |= resident
        if place == "disk":
            folder = self.workdir(memory, form, _name(mesh), kind, "rows")
            keys |= {name.replace("resident", "host"): n // 2 for name, n in resident.items()}
            keys["tables.disk"] = folder
        return {key: str(value) for key, value in keys.items()}

    def config(self, memory: str, keys: dict[str, str]):
        """As `load_config` has it."""
        return load_config(ROOT / "configs" / f"{MEMORIES[memory][0]}.py", keys)

    def _resident_rows(self, memory: str) -> dict[str, int]:
        config = self.config(memory, {k: str(v) for k, v in (_SIZES | MEMORIES[memory][1]).items()})
        found = {}
        # Sizes alone are asked for.
        for name, spec in table_specs(with_eos(config, 0)).items():
            section = _SECTION.get(name, name)
            rows = spec.num_rows // _SHARES[section]
            found[f"{section}.resident_rows"] = rows - rows % _SHARDS
        return found

    def flags(self, memory: str, keys: dict[str, str], workdir: Path) -> list[str]:
        """Of the training command."""
        return [
            f"--config={ROOT / 'configs' / MEMORIES[memory][0]}.py",
            f"--workdir={workdir}",
            *(f"--config.{key}={value}" for key, value in keys.items()),
        ]

    def workdir(self, *names: str) -> Path:
        """Of one run, by what it is."""
        return self.folder / "_".join(names).replace(" ", "").replace(",", "-")

    def outcome(self, workdir: Path) -> dict:
        """Losses, and a digest of all that it ended with."""
        digest = hashlib.sha256()
        for name, array in sorted(saved_arrays(workdir, self.steps).items()):
            digest.update(name.encode() + array.tobytes())
        return {"losses": losses(workdir), "digest": digest.hexdigest()}


def run_mesh(runs: Runs, mesh: tuple[int, ...], memories: list[str], forms: list[str]) -> None:
    """All runs on a mesh, one after the other, in a process that has its devices."""
    keep_programs(folder=runs.compiled)
    for memory, form, place in itertools.product(memories, forms, PLACES):
        workdir = runs.workdir(memory, form, _name(mesh), place)
        run.train(runs.config(memory, runs.keys(memory, form, mesh, place)), workdir)
        print(f"{workdir.name} ended", flush=True)


def run_killed(runs: Runs, memory: str, form: str, mesh: tuple[int, ...]) -> int:
    """A run that is killed some steps after its first checkpoint, and goes on; when, in steps."""
    workdir = runs.workdir(memory, form, "killed")
    flags = runs.flags(memory, runs.keys(memory, form, mesh, PLACES[-1], "killed"), workdir)
    devices, first = math.prod(mesh), runs.every
    saved = workdir / "checkpoints" / str(first)
    with _started([sys.executable, "-m", "stem_jax.train", *flags], devices) as process:
        while not (saved.exists() and len(losses(workdir)) > first + 1):
            if process.poll() is not None:
                raise RuntimeError(f"{workdir} ended with {process.returncode} of itself")
            time.sleep(0.02)
        process.kill()
    reached = len(losses(workdir))
    _finish([sys.executable, "-m", "stem_jax.train", *flags], devices)
    # Those that were made again are there twice.
    return reached


def run_processes(runs: Runs, memory: str, form: str, number: int) -> Path:
    """A run of so many processes, which have eight devices together; its work folder."""
    workdir = runs.workdir(memory, form, f"of {number} processes")
    keys = runs.keys(memory, form, PROCESSES_MESH, PLACES[-1], f"of {number}")
    flags = runs.flags(memory, keys, workdir)
    devices = math.prod(PROCESSES_MESH) // number
    _finish(["launch/local_multihost.sh", str(number), f"--devices={devices}", *flags])
    return workdir


def _started(command: list[str], devices: int = 1) -> subprocess.Popen:
    settings = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        # Of launchers, which else take the first that is called so.
        "PYTHON": sys.executable,
    }
    # What fails says so below its work folder.
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _finish(command: list[str], devices: int = 1) -> None:
    with _started(command, devices) as process:
        code = process.wait()
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}")


def compare(
    runs: Runs,
    memories: list[str],
    forms: list[str],
    meshes: list[tuple[int, ...]],
    others: bool = True,
) -> list[dict[str, str]]:
    """Makes all runs.

    Args:
        others: also of two processes, and killed.

    Returns:
        What is found of each memory and format; NOT before what does not hold.
    """
    for mesh in meshes:
        flags = [f"--child={_name(mesh)}", f"--folder={runs.folder}", f"--steps={runs.steps}"]
        flags += [f"--memories={','.join(memories)}", f"--formats={','.join(forms)}"]
        _finish([sys.executable, "-m", "benchmarks.memories", *flags], math.prod(mesh))
    records = []
    for memory, form in itertools.product(memories, forms):
        record: dict[str, tuple[bool, str]] = {}
        ends = {
            (mesh, place): runs.outcome(runs.workdir(memory, form, _name(mesh), place))
            for mesh, place in itertools.product(meshes, PLACES)
        }

        for mesh in meshes:
            same = all(ends[mesh, place] == ends[mesh, PLACES[0]] for place in PLACES)
            record[f"rows, {_name(mesh)}"] = same, "equal"
        first = ends[meshes[0], PLACES[0]]
        apart = max(_apart(ends[mesh, PLACES[0]], first) for mesh in meshes)
        record["meshes"] = apart <= OF_SUMS, f"{apart:.1e}"
        if others:
            reached = run_killed(runs, memory, form, meshes[-1])
            end = runs.outcome(runs.workdir(memory, form, "killed"))
            same = end == ends[meshes[-1], PLACES[0]]
            record["killed"] = same, f"equal, after step {reached}"
        if others and PROCESSES_MESH in meshes:
            one, two = (runs.outcome(run_processes(runs, memory, form, n)) for n in (1, 2))
            apart = _apart(one, two)
            said = "equal" if one == two else f"{apart:.1e}"
            record["two processes"] = apart <= OF_PROCESSES[form], said
            apart = _apart(one, ends[PROCESSES_MESH, PLACES[0]])
            record["without gloo"] = apart <= OF_SUMS, f"{apart:.1e}"
        found = {name: what if holds else f"NOT {what}" for name, (holds, what) in record.items()}
        records.append({"memory": memory, "format": form} | found)
        print(json.dumps(records[-1]), flush=True)
    return records


def _apart(one: dict, other: dict) -> float:
    """The largest difference of two runs' losses."""
    assert one["losses"].keys() == other["losses"].keys()
    return max(abs(loss - other["losses"][step]) for step, loss in one["losses"].items())


def table(records: list[dict[str, str]]) -> str:
    """A line for each memory and format."""
    names = list(records[0])
    lines = [names, ["---"] * len(names), *([record[n] for n in names] for record in records)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Makes the runs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--memories", default=",".join(MEMORIES))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--meshes", default=" ".join(map(_name, MESHES)), help="data,fsdp,tensor")
    parser.add_argument("--alone", action="store_true", help="none of two processes, none killed")
    parser.add_argument("--folder", type=Path, help="kept; without it, a temporary one")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    # The runs are on the CPU, and so is what compares them.
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("absl").setLevel(logging.ERROR)
    memories, forms = args.memories.split(","), args.formats.split(",")
    if args.child:
        run_mesh(Runs(args.folder, args.steps), _mesh(args.child), memories, forms)
        return
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runs = Runs(folder, args.steps)
        runs.prepare()
        meshes = [_mesh(text) for text in args.meshes.split()]
        records = compare(runs, memories, forms, meshes, not args.alone)
    print(table(records))
    print(f"{args.steps} steps; jax {jax.__version__}, Python {platform.python_version()}")
    sys.exit(any(what.startswith("NOT") for record in records for what in record.values()))


def _name(mesh: tuple[int, ...]) -> str:
    return ",".join(map(str, mesh))


def _mesh(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    main()
