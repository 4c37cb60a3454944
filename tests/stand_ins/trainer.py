"""A stand-in for the training command: notes how it was started and does what a test planned.

--plan=FILE holds, by process, what each start does: "complete", "wait" (until SIGTERM, then saves),
"deaf" (until killed), "killed", or an exit code. FILE.started gets a line per start. Like a real
one, it does nothing before all are there: two of each slice, which it learns of as JAX does.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

SLICES = int(os.environ.get("MEGASCALE_NUM_SLICES", 1))
index = os.environ.get("JAX_PROCESS_ID") or os.environ["SLURM_PROCID"]
index = str(int(index) + 2 * int(os.environ.get("MEGASCALE_SLICE_ID", 0)))
plan = next(Path(flag[7:]) for flag in sys.argv if flag.startswith("--plan="))
started = Path(f"{plan}.started")


def starts() -> list[dict]:
    """All that are noted, without what somebody is still writing."""
    text = started.read_text() if started.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


count = sum(record["process"] == index for record in starts())
action = json.loads(plan.read_text())[index][count]


def stop(*_) -> None:
    print("stopped at step 7; the same command continues", flush=True)
    sys.exit(0)


signal.signal(signal.SIGTERM, signal.SIG_IGN if action == "deaf" else stop)
with started.open("ab", buffering=0) as file:
    # One write, whatever the others write.
    record = {"process": index, "argv": sys.argv[1:], "folder": os.getcwd()}
    file.write(json.dumps(record | {"environment": dict(os.environ)}).encode() + b"\n")


def of_this_size() -> list[dict]:
    """The starts on as many slices."""
    number = str(SLICES)
    return [r for r in starts() if r["environment"].get("MEGASCALE_NUM_SLICES", "1") == number]


own = sum(r["process"] == index for r in of_this_size())
while len(of_this_size()) < 2 * SLICES * own:
    time.sleep(0.02)
if index == "0":
    print(f"step {count + 1}: loss 1.0", flush=True)
    print("\r 50%|", end="", file=sys.stderr, flush=True)
if action == "complete":
    if index == "0":
        print("\rrun complete: step 9", flush=True)
elif action in ("wait", "deaf"):
    while True:
        time.sleep(0.1)
elif action == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
else:
    print(f"error: process {index}: refused by plan", file=sys.stderr)
    sys.exit(int(action))
