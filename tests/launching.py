"""What the tests of launchers share: a small run, and processes looked at from outside."""

import contextlib
import time

import psutil
from children import ROOT

STAND_INS = ROOT / "tests" / "stand_ins"
STEPS = 60
SMALL = {
    "model.vocab_size": 300,
    "model.embed_dim": 32,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.ffn_dim": 48,
    "model.stem_layers": "1",
    "data.sources": "facts",
    "data.tokenizer": "bytes",
    "train.seq_len": 32,
    "train.steps": STEPS,
    "eval.every": 0,
    "eval.baselines": "False",
    "checkpoint.every": 10,
    "train.sample_prompt": "",
}


def kill_if(condition) -> None:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if condition(process):
                process.kill()


def wait_until(condition, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
