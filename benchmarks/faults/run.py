"""A work folder and the processes that train in it, as the faults see them from outside."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from stem_jax.bucket import list_objects
from stem_jax.goodput.start_record import read_starts, record_path
from stem_jax.local_copy import VARIABLE
from tests.buckets import Bucket

ROOT = Path(__file__).parents[2]
_FLAGS = """
--config=configs/tiny.py --config.data.sources=facts --config.data.tokenizer=bytes
--config.model.vocab_size=300 --config.model.num_layers=2 --config.model.embed_dim=32
--config.model.num_heads=2 --config.model.num_kv_heads=1 --config.model.ffn_dim=48
--config.model.stem_layers=1 --config.train.seq_len=32 --config.eval.every=0
--config.eval.baselines=False --config.train.sample_prompt=
--config.optimizer.schedule_steps=20000
""".split()
# Seconds, longer than a step with its compilation.
STEP_TIMEOUT = 90
# Of so many saves of a table one has all rows.
FULL_EVERY = 3
# No campaign gets there: a run is told to stop when all rounds are over.
_ENDLESS = 20_000
_POLL_SECONDS = 0.05
# Holds some records.
_TAIL_BYTES = 2**15
_PATIENCE_SECONDS = 900


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a start lays the run out: processes, CPU devices of each, rows on them (None: all)."""

    processes: int = 2
    devices: int = 2
    resident_rows: int | None = 256


def copy_of(bucket: Bucket, copies: Path, name: str, process: int) -> Path:
    """Where a process has what it appends to of a run in a bucket."""
    return copies / f"process_{process}" / bucket.scheme / bucket.name / name


class Run:
    """A run that is started, and started again, by `launch/local_multihost.sh`."""

    def __init__(
        self,
        workdir: Path,
        every: int,
        cache: Path,
        disk: bool,
        step_timeout: int = STEP_TIMEOUT,
        full_every: int = FULL_EVERY,
        bucket: Bucket | None = None,
    ):
        """Args:
        workdir: of a run in a bucket the copy that process 0 has of it, see `copy_of`.
        every: steps between checkpoints.
        full_every: of so many saves of a table one has all rows.
        cache: of compiled programs.
        disk: most rows are there, in the work folder.
        step_timeout: after which a process that stands still is ended, in seconds.
        bucket: that the run's folder is in.
        """
        self.bucket = bucket
        self._address = workdir if bucket is None else bucket.path / workdir.name
        self.workdir, self.every, self.disk = workdir, every, workdir / "rows" if disk else None
        self.shape = Shape()
        self._flags = [
            *_FLAGS,
            f"--workdir={self._address}",
            f"--config.checkpoint.every={every}",
            f"--config.checkpoint.full_every={full_every}",
            f"--config.train.step_timeout={step_timeout}",
            f"--config.train.compilation_cache={cache}",
        ]
        if disk:
            self._flags += [f"--config.tables.disk={self.disk}", "--config.tables.host_rows=64"]
        self._script: subprocess.Popen | None = None
        self._begun = workdir.parent / f"{workdir.name}.started.json"

    def start(self, steps: int = _ENDLESS, **environment: str) -> None:
        """Starts all processes.

        Args:
            steps: at which it is complete.
            environment: of `start_process.sh`.
        """
        rows = self.shape.resident_rows
        flags = [f"--config.train.steps={steps}", f"--config.tables.resident_rows={rows}"]
        settings = {
            "GRACE_SECONDS": "5",
            "PYTHON": str(Path(__file__).parent / "start_process.sh"),
            "FAULT_PYTHON": sys.executable,
            # What JAX says of processes that find, lose and tell each other something.
            "TF_CPP_MIN_LOG_LEVEL": "0",
        }
        if self.bucket is not None:
            # Above process_0, the scheme and the bucket.
            settings |= {VARIABLE: str(self.workdir.parents[3])} | self.bucket.environment
        script = ["launch/local_multihost.sh", f"{self.shape.processes}"]
        with (self.workdir.parent / f"{self.workdir.name}.log").open("ab") as output:
            self._script = subprocess.Popen(
                [*script, f"--devices={self.shape.devices}", *self._flags, *flags],
                cwd=ROOT,
                stdout=output,
                stderr=output,
                env=os.environ | settings | environment,
            )
        began = psutil.Process(self._script.pid).create_time()
        self._begun.write_text(json.dumps({"pid": self._script.pid, "began": began}))

    def end_leftovers(self) -> None:
        """Kills what an interrupted campaign left running of this run."""
        if not self._begun.exists():
            return
        found = json.loads(self._begun.read_text())
        with contextlib.suppress(psutil.NoSuchProcess):
            script = psutil.Process(found["pid"])
            if abs(script.create_time() - found["began"]) < 1:
                processes = [script, *script.children(recursive=True)]
                for process in processes:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                psutil.wait_procs(processes, timeout=30)
        if self._script is not None:
            # Its own, which is asked how it ended.
            self._script.wait(timeout=30)
        for process in psutil.process_iter(["cmdline"]):
            # Of a script that was killed alone.
            if f"--workdir={self._address}" in (process.info["cmdline"] or []):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def process(self, index: int) -> psutil.Process:
        """One of its processes; 0 is the coordinator."""
        assert self._script is not None
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for child in psutil.Process(self._script.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    # Not the subshell that the script starts it from.
                    own = child.cmdline()
                    if f"--process-index={index}" in own and "-m" in own[:3]:
                        return child
            time.sleep(_POLL_SECONDS)
        raise ProcessLookupError(f"process {index} of {self.workdir} is not there")

    def processes(self) -> list[psutil.Process]:
        """All of them."""
        return [self.process(index) for index in range(self.shape.processes)]

    @property
    def ended(self) -> int | None:
        """The exit status; None while it runs."""
        assert self._script is not None
        return self._script.poll()

    def last_step(self) -> int:
        """The newest step in the metrics."""
        path = self.workdir / "metrics.jsonl"
        if not path.exists():
            return 0
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
        # What follows the last end of a line is being written.
        whole = [line for line in lines[:-1] if line.startswith(b"{")]
        return json.loads(whole[-1])["step"] if whole else 0

    def unfinished_saves(self) -> list[int]:
        """Steps of checkpoints whose writing was begun and not ended."""
        folder = self._address / "checkpoints"
        if self.bucket is not None:
            found = [name.partition("/") for name in list_objects(folder)]
            whole = {step for step, _, name in found if name == "commit_success.txt"}
            return [int(step) for step in {step for step, *_ in found} - whole if step.isdecimal()]
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return [int(name.split(".")[0]) for name in names if ".orbax-checkpoint-tmp" in name]

    def wait_for(self, step: int) -> None:
        """Returns when a step is logged; fails if the processes end before."""
        self.wait_until(lambda: self.last_step() >= step, f"step {step}")

    def wait_until(self, condition, what: str) -> None:
        """Returns when it holds; fails if the processes end before."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not condition():
            if self.ended is not None:
                raise RuntimeError(f"ended with {self.ended} before {what}; see {self.workdir}.log")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.workdir} did not come to {what}")
            time.sleep(_POLL_SECONDS)

    def wait(self, seconds: float | None = _PATIENCE_SECONDS) -> int:
        """The exit status, once every process is gone; None waits for as long as that takes."""
        assert self._script is not None
        return self._script.wait(timeout=seconds)

    def newest_start(self) -> str:
        """What process 0 has logged since it was started the last time."""
        path = self.workdir / "logs" / "process_000.log"
        log = path.read_text() if path.exists() else ""
        return log[max(log.rfind("INFO process 0 on "), 0) :]

    def starts(self) -> int:
        """How often process 0 got as far as its log."""
        path = self.workdir / "logs" / "process_000.log"
        return path.read_text().count("INFO process 0 on ") if path.exists() else 0

    def resumed_from(self) -> int:
        """The step at which the newest start began."""
        found = re.search(r"resuming from step (\d+)", self.newest_start())
        return int(found[1]) if found else 0

    def account(self, process: int) -> Path:
        """Where a process keeps its account of time."""
        if self.bucket is None:
            return record_path(self.workdir, process)
        return record_path(
            copy_of(self.bucket, self.workdir.parents[3], self.workdir.name, process), process
        )

    def step_of_start(self) -> int:
        """The newest step of the newest start; 0 before its first."""
        starts = read_starts(record_path(self.workdir, 0))
        return starts[-1].step if starts and starts[-1].steps_made else 0

    def copy(self, folder: Path) -> "Run":
        """A run that goes on from the same checkpoint elsewhere, in the first shape."""
        shutil.copytree(self.workdir, folder)
        own = Run.__new__(Run)
        own.__dict__ = dict(self.__dict__)
        own.workdir, own.shape, own._script = folder, Shape(), None
        own._flags = [f.replace(str(self.workdir), str(folder)) for f in self._flags]
        own._begun = folder.parent / f"{folder.name}.started.json"
        return own
