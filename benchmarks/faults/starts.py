"""Faults around a start: told to stop, then killed on the way to the first step."""

import contextlib
import hashlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from benchmarks.faults.plan import Round
from benchmarks.faults.run import ROOT, Run

# How long they take at most on a machine with nothing else to do.
_JOIN_SECONDS, _RESTORE_SECONDS, _EXCHANGE_SECONDS, _PREPARE_SECONDS = 5.0, 2.5, 4.0, 4.0
# Within which a run stops: processes look for SIGTERM once a second.
_STOP_STEPS = 100


def terminate(run: Run, at: Round, rng: random.Random) -> int:
    """A process is told to stop: all save soon, and none fails."""
    process, reached = run.process(rng.randrange(run.shape.processes)), run.last_step()
    process.terminate()
    code = run.wait()
    if code != 0:
        raise RuntimeError(f"exit status {code} after SIGTERM")
    if (more := run.last_step() - reached) > _STOP_STEPS:
        raise RuntimeError(f"{more} steps were made after SIGTERM")
    return code


def victims(run: Run, rng: random.Random) -> list[psutil.Process]:
    """One process, the coordinator, or all."""
    processes = run.processes()
    return rng.choice([processes, [processes[0]], [rng.choice(processes[1:] or processes)]])


def kill(processes: list[psutil.Process]) -> None:
    """One may have ended by itself, as another was killed."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def kill_while_joining(run: Run, at: Round, rng: random.Random) -> int:
    """Imports, and the processes finding each other."""
    return _killed_at_start(run, at, rng, lambda: True, _JOIN_SECONDS)


def kill_in_restore(run: Run, at: Round, rng: random.Random) -> int:
    """From the report of the start to the restored state, and somewhat on."""
    return _killed_at_start(
        run, at, rng, lambda: "\nlength " in run.newest_start(), _RESTORE_SECONDS
    )


def kill_before_exchange(run: Run, at: Round, rng: random.Random) -> int:
    """From the restored state over the first collectives to the first step, and somewhat on."""
    there = "resuming from step"
    return _killed_at_start(run, at, rng, lambda: there in run.newest_start(), _EXCHANGE_SECONDS)


def _killed_at_start(
    run: Run, at: Round, rng: random.Random, reached: Callable[[], bool], seconds: float
) -> int:
    terminate(run, at, rng)
    known = run.starts()
    run.start()
    chosen = victims(run, rng)
    if seconds != _JOIN_SECONDS:
        run.wait_until(lambda: run.starts() > known and reached(), "its restore")
    time.sleep(at.moment * seconds)
    kill(chosen)
    return run.wait()


def kill_in_prepare(run: Run, at: Round, rng: random.Random) -> None:
    """Beside the run a store is prepared, killed, and prepared by the same command again."""
    place = run.workdir.parent
    text, whole, folder = place / "text", place / "prepared", place / "prepared_again"
    if not text.exists():
        # A copy: a later round may have another version of the documentation.
        shutil.copytree(ROOT / "docs", text)
        shutil.rmtree(whole, ignore_errors=True)
    if not whole.exists() and (code := _prepare(text, whole).wait()):
        raise RuntimeError(f"prepare ended with {code}")
    shutil.rmtree(folder, ignore_errors=True)
    process = _prepare(text, folder)
    time.sleep(at.moment * _PREPARE_SECONDS)
    process.kill()
    process.wait()
    if not folder.exists() and (code := _prepare(text, folder).wait()):
        raise RuntimeError(f"prepare ended with {code} after a kill")
    assert _digests(folder) == _digests(whole)
    return None


def _prepare(text: Path, folder: Path) -> subprocess.Popen:
    flags = [f"--input={text / '*.md'}", "--tokenizer=bytes", "--processes=1", f"--out={folder}"]
    return subprocess.Popen(
        [sys.executable, "-m", "stem_jax.prepare", *flags],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
