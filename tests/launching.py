"""What the tests of launchers share: a small run, and processes looked at from outside."""

import contextlib
import json
import subprocess
import time
from pathlib import Path

import psutil

from tests.children import ROOT

STAND_INS = ROOT / "tests" / "stand_ins"
STEPS = 60
SMALL = {
    "model.vocab_size": 300,
    "model.embed_dim": 32,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.ffn_dim": 48,
    "model.stem_layers": "0",
    "data.sources": "facts",
    "data.tokenizer": "bytes",
    "train.seq_len": 32,
    "train.steps": STEPS,
    "eval.every": 0,
    "eval.baselines": "False",
    "checkpoint.every": 10,
    "train.sample_prompt": "",
}


def notes(path: Path) -> list:
    """What stand-ins have written there, a line each; one being written does not count yet."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def kill_if(condition) -> None:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if condition(process):
                process.kill()


def wait_until(condition, process: subprocess.Popen | None = None, seconds: float = 240) -> None:
    """Waits for what the process, if one is given, is to bring about before it ends."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None:
            said = process.stderr or process.stdout
            assert process.poll() is None, said.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_records(workdir: Path, process: subprocess.Popen, number: int) -> None:
    """Waits for so many whole lines of metrics."""
    metrics = workdir / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= number, process)


def wait_for_checkpoint(workdir: Path, process: subprocess.Popen, step: int) -> None:
    """Waits until the checkpoint is whole: a save goes on beside the steps, in a folder that gets
    its name at the end."""
    wait_until((workdir / "checkpoints" / str(step)).exists, process)
