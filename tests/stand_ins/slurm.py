#!/usr/bin/env python3
"""A stand-in for srun, scancel, squeue and scontrol, by the name it is called by.

$SLURM_STATE is its memory: calls.jsonl (what it was asked), state (of the job; RUNNING without it),
step (process groups of the tasks). Where it is known to bite it does as Slurm 22.05 does: a SIGTERM
to srun itself kills its tasks, scancel does not signal the batch script, and srun returns the
highest exit code. $SCANCEL_SECONDS is how long scancel takes to return.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

STATE = Path(os.environ["SLURM_STATE"])
STEP = STATE / "step"
# Seconds between the SIGTERM and the SIGKILL for the peers of a failed task.
KILL_WAIT = 2


def srun(argv: list[str]) -> int:
    flags = []
    while argv[0].startswith("-"):
        flags.append(argv.pop(0))
    assert flags == ["--kill-on-bad-exit=1", "--gpu-bind=none"], flags
    count = int(os.environ["SLURM_NTASKS"])
    tasks = [
        subprocess.Popen(
            argv,
            env=os.environ
            | {
                "SLURM_PROCID": str(number),
                "SLURM_LOCALID": str(number),
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_STEP_NUM_NODES": "1",
            },
            start_new_session=True,
        )
        for number in range(count)
    ]

    def tell(number: int) -> None:
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, number)

    signal.signal(signal.SIGTERM, lambda *_: tell(signal.SIGKILL))
    STEP.write_text(" ".join(str(task.pid) for task in tasks))
    failed_at = None
    while any(task.poll() is None for task in tasks):
        if failed_at is None and any(task.poll() for task in tasks):
            failed_at = time.monotonic()
            tell(signal.SIGTERM)
        if failed_at is not None and time.monotonic() - failed_at > KILL_WAIT:
            tell(signal.SIGKILL)
        time.sleep(0.02)
    STEP.unlink()
    codes = [task.returncode for task in tasks]
    return max(128 - code if code < 0 else code for code in codes)


def scancel(argv: list[str]) -> int:
    assert argv == ["--signal=TERM", os.environ["SLURM_JOB_ID"]], argv
    if not STEP.exists():
        print("scancel: error: Kill job error", file=sys.stderr)
        return 1
    for group in STEP.read_text().split():
        os.killpg(int(group), signal.SIGTERM)
    time.sleep(float(os.environ.get("SCANCEL_SECONDS", "0")))
    return 0


def squeue(argv: list[str]) -> int:
    assert argv == ["--noheader", f"--jobs={os.environ['SLURM_JOB_ID']}", "--format=%T"], argv
    state = STATE / "state"
    print(state.read_text() if state.exists() else "RUNNING")
    return 0


def scontrol(argv: list[str]) -> int:
    assert argv == ["requeue", os.environ["SLURM_JOB_ID"]], argv
    return 0


if __name__ == "__main__":
    name = Path(sys.argv[0]).name
    with (STATE / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps([name, *sys.argv[1:]]) + "\n")
    sys.exit({f.__name__: f for f in (srun, scancel, squeue, scontrol)}[name](sys.argv[1:]))
