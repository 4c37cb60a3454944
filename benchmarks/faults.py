"""Faults against a run of two processes; after each the same command continues it.

python -m benchmarks.faults [--rounds=20] [--seed=0] [--checkpoint-every=10] [--disk]

One run with offloaded tables goes through all rounds, started again by `launch/local_multihost.sh`
with the same flags each time. A fault comes at a random step, and faults take turns. At the end its
parameters, optimizer states, tables and losses are those of a run that nothing happened to, bit for
bit, or the program exits with 1. With --disk all but 64 rows are on disk, in the work folder.

lost steps: logged before the fault and done again after it; never more than the interval and the
steps that ran beside a save that did not get to the disk (in flight). down: seconds until every
process was gone. recovered: seconds from the fault to the first new step, with the start.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import psutil

from benchmarks.saved_state import losses, saved_arrays

ROOT = Path(__file__).parent.parent
PROCESSES = 2
_FLAGS = """
--config=configs/tiny.py --config.data.sources=facts --config.data.tokenizer=bytes
--config.model.vocab_size=300 --config.model.num_layers=2 --config.model.embed_dim=32
--config.model.num_heads=2 --config.model.num_kv_heads=1 --config.model.ffn_dim=48
--config.model.stem_layers=1 --config.train.seq_len=32 --config.eval.every=0
--config.eval.baselines=False --config.tables.resident_rows=256
""".split()
# Longer than a step with its compilation on a busy machine.
_STEP_TIMEOUT = 45
_DISK_MIB = 256


class Run:
    """A work folder and the processes that train in it."""

    def __init__(self, workdir: Path, steps: int, every: int, cache: Path, disk: bool):
        self.workdir = workdir
        self.steps = steps
        self._flags = [
            *_FLAGS,
            f"--workdir={workdir}",
            f"--config.train.steps={steps}",
            f"--config.checkpoint.every={every}",
            f"--config.train.step_timeout={_STEP_TIMEOUT}",
            f"--config.train.compilation_cache={cache}",
        ]
        self.disk = workdir / "rows" if disk else None
        if disk:
            self._flags += [f"--config.tables.disk={self.disk}", "--config.tables.host_rows=64"]
        self._script: subprocess.Popen | None = None

    def start(self) -> None:
        """Starts all processes."""
        workers = f"{PROCESSES}"
        with (self.workdir.parent / f"{self.workdir.name}.log").open("ab") as output:
            self._script = subprocess.Popen(
                ["launch/local_multihost.sh", workers, "--devices=2", *self._flags],
                cwd=ROOT,
                stdout=output,
                stderr=output,
                env=os.environ | {"GRACE_SECONDS": "5"},
            )

    def process(self, index: int) -> psutil.Process:
        """One of its processes; 0 is the coordinator."""
        for child in psutil.Process(self._script.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if f"--process-index={index}" in child.cmdline():
                    return child
        raise ProcessLookupError(f"process {index} of {self.workdir} is not there")

    def last_step(self) -> int:
        """The newest step in the metrics."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)

    def unfinished_saves(self) -> list[int]:
        """Steps of checkpoints whose writing was begun and not ended."""
        names = [path.name for path in (self.workdir / "checkpoints").iterdir()]
        return [int(name.split(".")[0]) for name in names if ".orbax-checkpoint-tmp" in name]

    def wait_for(self, step: int) -> None:
        """Returns when a step is logged; fails if the processes end before."""
        while self.last_step() < step:
            code = self._script.poll()
            if code is not None:
                raise RuntimeError(f"ended with {code} before step {step}; see {self.workdir}.log")
            time.sleep(0.02)

    def wait(self) -> int:
        """The exit status, once every process is gone."""
        return self._script.wait(timeout=600)

    def resumed_from(self) -> int:
        """The step at which the newest start began."""
        log = (self.workdir / "logs" / "process_000.log").read_text()
        newest = log[log.rindex("INFO process 0 on ") :]
        found = re.search(r"resuming from step (\d+)", newest)
        return int(found[1]) if found else 0


def _kill_one(run: Run, rng: random.Random) -> int:
    run.process(rng.randrange(1, PROCESSES)).kill()
    return run.wait()


def _kill_coordinator(run: Run, rng: random.Random) -> int:
    run.process(0).kill()
    return run.wait()


def _kill_all(run: Run, rng: random.Random) -> int:
    for process in [run.process(index) for index in range(PROCESSES)]:
        process.kill()
    return run.wait()


def _terminate(run: Run, rng: random.Random) -> int:
    run.process(rng.randrange(PROCESSES)).terminate()
    code = run.wait()
    if code != 0:
        raise RuntimeError(f"exit status {code} after SIGTERM")
    return code


def _truncate(run: Run, rng: random.Random) -> int:
    code = _terminate(run, rng)
    path = rng.choice([path for path in _files(run) if path.stat().st_size])
    os.truncate(path, rng.randrange(path.stat().st_size))
    return code


def _unlink(run: Run, rng: random.Random) -> int:
    code = _terminate(run, rng)
    rows = [path for path in _files(run) if "/table" in str(path) or "/saves/" in str(path)]
    rng.choice(rows).unlink()
    return code


def _fill_disk(run: Run, rng: random.Random) -> int:
    filler = run.workdir / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(2**20)):
            pass
    code = run.wait()
    filler.unlink()
    return code


def _suspend(run: Run, rng: random.Random) -> int:
    run.process(rng.randrange(PROCESSES)).suspend()
    return run.wait()


FAULTS: dict[str, Callable[[Run, random.Random], int]] = {
    "kill -9 of a process": _kill_one,
    "kill -9 of the coordinator": _kill_coordinator,
    "kill -9 of all": _kill_all,
    "SIGTERM to a process": _terminate,
    "newest checkpoint truncated": _truncate,
    "newest checkpoint lacks a file": _unlink,
    "full disk": _fill_disk,
    "stuck process": _suspend,
}


def campaign(
    folder: Path,
    rounds: int,
    seed: int,
    every: int,
    faults: list[str],
    cache: Path | None = None,
    disk: bool = False,
) -> list[dict]:
    """Runs all rounds and compares the end with an undisturbed run.

    cache: of compiled programs; None: one below `folder`. disk: most rows are there.

    Returns one record per round. Raises AssertionError where the two differ.
    """
    rng = random.Random(seed)
    # A fault comes at most 14 steps after a start, and the run goes on until it strikes.
    steps = 20 * rounds + 3 * every
    cache = cache or folder / "compiled"
    calm = Run(folder / "calm", steps, every, cache, disk)
    calm.workdir.mkdir()
    calm.start()
    assert calm.wait() == 0, f"see {calm.workdir}.log"
    records = []
    with _disk(folder / "disturbed", "full disk" in faults) as workdir:
        run = Run(workdir, steps, every, cache, disk)
        run.start()
        # Two checkpoints, so that one of them may be damaged.
        step = 2 * every
        for number in range(rounds):
            name = faults[number % len(faults)]
            step += rng.randrange(1, 15)
            run.wait_for(step)
            began = time.monotonic()
            code = FAULTS[name](run, rng)
            down = time.monotonic() - began
            reached, saving = run.last_step(), run.unfinished_saves()
            run.start()
            run.wait_for(reached + 1)
            resumed = run.resumed_from()
            # Steps beside a save that the fault found on its way to the disk.
            in_flight = reached - min(saving) if saving else 0
            records.append(
                {
                    "fault": name,
                    "step": reached,
                    "exit_status": code,
                    "lost_steps": reached - resumed,
                    "in_flight": in_flight,
                    "down_seconds": round(down, 1),
                    "recovered_seconds": round(time.monotonic() - began, 1),
                }
            )
            step = reached + 1
        assert run.wait() == 0, f"see {run.workdir}.log"
        expected, found = (saved_arrays(each.workdir, steps) for each in (calm, run))
        assert expected.keys() == found.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)
        assert losses(run.workdir) == losses(calm.workdir)
    return records


def table(records: list[dict]) -> str:
    """A line per fault; of lost steps and of the time that it is down, the most."""
    lines = [
        "| fault | rounds | exit status | lost steps | in flight | down | recovered, median |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(record["fault"] for record in records):
        own = [record for record in records if record["fault"] == name]
        codes = ", ".join(map(str, sorted({record["exit_status"] for record in own})))
        recovered = statistics.median(record["recovered_seconds"] for record in own)
        lines.append(
            f"| {name} | {len(own)} | {codes} | {max(r['lost_steps'] for r in own)} "
            f"| {max(r['in_flight'] for r in own)} "
            f"| {max(r['down_seconds'] for r in own):.0f} s | {recovered:.0f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the campaign, prints each round and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=10, help="steps")
    parser.add_argument("--disk", action="store_true", help="with most rows on disk")
    parser.add_argument("--folder", help="kept afterwards; without it, a temporary one")
    args = parser.parse_args()
    # The runs are on the CPU, and so is what compares them.
    jax.config.update("jax_platforms", "cpu")
    faults = [name for name in FAULTS if name != "full disk" or os.geteuid() == 0]
    if len(faults) < len(FAULTS):
        print("without a full disk: mounting a small one needs root")
    with contextlib.ExitStack() as stack:
        folder = args.folder or stack.enter_context(tempfile.TemporaryDirectory())
        every = args.checkpoint_every
        records = campaign(Path(folder), args.rounds, args.seed, every, faults, disk=args.disk)
    for record in records:
        print(json.dumps(record))
    lost = max(record["lost_steps"] - record["in_flight"] for record in records)
    assert lost <= args.checkpoint_every, f"{lost} steps were lost"
    print(table(records))
    print(
        f"{args.rounds} rounds, seed {args.seed}: the end equals that of the undisturbed run bit "
        f"for bit; jax {jax.__version__}, Python {platform.python_version()}"
    )


@contextlib.contextmanager
def _disk(folder: Path, small: bool) -> Iterator[Path]:
    """An empty folder, on a small file system of its own if asked for."""
    folder.mkdir()
    if not small:
        yield folder
        return
    size = f"size={_DISK_MIB}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _files(run: Run) -> list[Path]:
    """The files of the newest checkpoint that hold its arrays and its plain part."""
    folder = run.workdir / "checkpoints"
    newest = max(
        (path for path in folder.iterdir() if path.name.isdecimal()), key=lambda p: int(p.name)
    )
    listed = json.loads((newest / "files.json").read_text())
    files = [newest / name for name in listed if not name.startswith("_")]
    if run.disk is not None:
        save = f"step-{newest.name}"
        files += [*run.disk.glob(f"**/saves/{save}.json"), *run.disk.glob(f"**/saves/{save}/*")]
    return sorted(files)


if __name__ == "__main__":
    main()
