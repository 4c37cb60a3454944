"""A run whose folder is in a bucket: killed, resumed by a machine that has nothing, and read."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from stem_jax import bucket as objects
from stem_jax.data.documents import Document
from stem_jax.data.prepare import prepare_stores
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.local_copy import VARIABLE
from tests.buckets import Answer, gs_nightly
from tests.children import HELD, child, finish, gang, train_flags

STEPS = 12
SMALL = {
    "model.vocab_size": 288,
    "model.embed_dim": 32,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.ffn_dim": 48,
    "model.stem_layers": "1",
    "data.tokenizer": "bytes",
    "data.sources": "facts",
    "optimizer.warmup_steps": 2,
    "optimizer.schedule": "constant",
    "train.steps": STEPS,
    "train.global_batch_size": 8,
    "train.seq_len": 32,
    "train.sample_prompt": "",
    "eval.every": 4,
    "eval.max_batches": 2,
    "eval.baselines": False,
    "checkpoint.every": 4,
}

pytestmark = [pytest.mark.long, pytest.mark.little_effort]


# What one of the two configurations has, too.
CHAINS = {"tiny_offload": {"checkpoint__full_every": 4}}


def flags(config: str, workdir, **overrides) -> list[str]:
    return train_flags(config, workdir, SMALL, CHAINS.get(config, {}) | overrides)


class Machine:
    """Programs of a machine whose disk has nothing of any run."""

    def __init__(self, bucket, folder: Path):
        self.folder = folder
        self.environment = {**bucket.environment, VARIABLE: str(folder)}

    def program(self, name: str, *argv: str, code: int = 0) -> str:
        """What it printed; of a program that is refused, why."""
        start = "-m", f"stem_jax.{name}", *argv
        # There TensorStore says that it found no credentials for Google's emulator.
        with child(*start, stderr=subprocess.PIPE, **self.environment) as process:
            out, err = process.communicate(timeout=300)
            assert process.returncode == code, (err or out)[-5000:]
            return err if code else out

    def stopped_at(self, step: int, number: int, workdir, *argv: str) -> int:
        """Trains up to a step, and is sent a signal when the save before is done; how it ended."""
        saved = workdir / "checkpoints" / str((step - 1) // 4 * 4) / "commit_success.txt"
        go_on = self.folder.with_suffix(".go")
        start = ["-c", HELD, str(step), str(go_on)]
        with child(*start, *argv, **self.environment) as process:
            while not (any(step - 1 == r["step"] for r in self.records()) and saved.exists()):
                time.sleep(0.1)
                assert process.poll() is None, process.communicate()
            process.send_signal(number)
            go_on.touch()
            process.communicate(timeout=300)
            return process.returncode

    def killed_in_a_save(self, bucket, step: int, *argv: str) -> None:
        """Trains, and is killed while what the save of a step writes is on its way."""
        # Of a part of it; another part is there by then.
        bucket.proxy.held = f"(PUT|POST) .*checkpoints/{step}/opt_state/"
        with child("-m", "stem_jax.train", *argv, **self.environment) as process:
            while not bucket.proxy.waiting:
                time.sleep(0.05)
                assert process.poll() is None, process.communicate()
            process.kill()
            process.communicate()
        bucket.proxy.held = ""

    def log(self) -> str:
        [path] = self.folder.rglob("process_000.log")
        return path.read_text()

    def records(self) -> list[dict]:
        # What is being prepared comes and goes.
        found = [d for d, _, files in os.walk(self.folder) if "metrics.jsonl" in files]
        text = Path(found[0], "metrics.jsonl").read_text() if found else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]


def _records(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def _losses(records: list[dict]) -> dict:
    return {
        key: [(r["step"], r[key]) for r in records if key in r]
        for key in ("train/loss", "eval/loss")
    }


@pytest.fixture(scope="module")
def config(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def local_losses(config, tmp_path_factory) -> dict:
    """Of a run in a folder of this machine that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("local") / "run"
    with child("-m", "stem_jax.train", *flags(config, workdir)) as process:
        finish(process)
    found = _losses(_records((workdir / "metrics.jsonl").read_text()))
    assert len(found["train/loss"]) == STEPS and len(found["eval/loss"]) == 3
    return found


@pytest.mark.parametrize(
    ("config", "bucket"),
    [
        ("tiny", "s3"),
        ("tiny_offload", "gs"),
        pytest.param("tiny", "gs", marks=pytest.mark.nightly),
        pytest.param("tiny_offload", "s3", marks=pytest.mark.nightly),
    ],
    indirect=True,
)
def test_killed_and_resumed_elsewhere(config, local_losses, bucket, tmp_path):
    workdir = bucket.path / "runs" / "one"
    argv = flags(config, workdir)
    first, second, third, fourth = (Machine(bucket, tmp_path / name) for name in "abcd")
    assert first.stopped_at(7, signal.SIGKILL, workdir, *argv) == -signal.SIGKILL
    # The checkpoint of step 4 has its metrics with it.
    there = _records((workdir / "metrics.jsonl").read_text())
    assert [r["step"] for r in there if "train/loss" in r][:4] == [1, 2, 3, 4]
    second.killed_in_a_save(bucket, 8, *argv)
    begun = objects.list_objects(workdir / "checkpoints" / "8")
    assert begun and "commit_success.txt" not in begun
    assert "killed" in fourth.program("status", f"--workdir={workdir}")
    assert third.stopped_at(11, signal.SIGTERM, workdir, *argv) == 0
    assert "resuming from step 4" in third.log()
    out = fourth.program("train", *argv)
    assert "resuming from step 1" in out and f"run complete: step {STEPS}, {workdir}" in out
    assert _losses(_records((workdir / "metrics.jsonl").read_text())) == local_losses
    names = objects.list_objects(workdir)
    assert {"config.json", "loss.png", "logs/process_000.log"} <= names.keys()
    assert ".lock" not in names and not any(name.startswith(".") for name in names)
    assert any(name.startswith("tensorboard/") for name in names)
    steps = {name.split("/")[1] for name in names if name.startswith("checkpoints/")}
    assert str(STEPS) in steps
    bases = "_base" in (workdir / f"checkpoints/{STEPS}/layout/metadata").read_text()
    assert bases == (config in CHAINS)
    said = Machine(bucket, tmp_path / "reader").program("status", f"--workdir={workdir}")
    assert said.startswith(f"{workdir}: complete (at step {STEPS})") and f"newest {STEPS}" in said
    assert "is at step 12 of 12" in first.program("train", *argv)


@gs_nightly
def test_two_processes_and_another_machine_for_each(bucket, tmp_path):
    workdir = bucket.path / "pair"
    for turn, steps in ((0, 6), (1, 9)):
        commands = [flags("tiny", workdir, train__steps=steps)] * 2
        where = {VARIABLE: str(tmp_path / str(turn)), **bucket.environment}
        started = gang("stem_jax.train", *commands, **where)
        with started[0] as one, started[1] as two:
            out = finish(one)
            finish(two)
    assert "resuming from step 6" in out
    records = _records((workdir / "metrics.jsonl").read_text())
    assert [r["step"] for r in records if "train/loss" in r] == list(range(1, 10))
    assert {"logs/process_000.log", "logs/process_001.log"} <= objects.list_objects(workdir).keys()


# What the second process downloads is another store than the first one's, of which but the held-out
# text differs; each has a cache of its own.
REWRITTEN = """
import os, sys
from pathlib import Path
from stem_jax import run, storage
from stem_jax.bucket import upload_folder
second = "--process-index=1" in sys.argv
os.environ["STEM_JAX_STAGED"] = os.environ["CACHES"] + "/" + str(int(second))
opened = run.open_run_data
def open_run_data(*args, **kwargs):
    data = opened(*args, **kwargs)
    if not second:
        address = storage.place(os.environ["STORE"], "store")
        upload_folder(Path(os.environ["OTHER"]), address)
    return data
run.open_run_data = open_run_data
"""


@pytest.mark.parametrize("rewritten", [True, False])
def test_a_store_that_is_rewritten_between_two_downloads(s3_bucket, tmp_path, rewritten):
    """The processes come to the same refusal before the first step."""
    options = {"name": "t", "seed": 0, "progress": False, "validation_fraction": 0.2}
    tokenizer = load_tokenizer("bytes")
    for name, last in (("one", "j"), ("other", "J")):
        documents = [Document(letter * 50, letter) for letter in "abcdefghi" + last]
        prepare_stores(documents, tokenizer, tmp_path / name, **options)
    one, other = tmp_path / "one", tmp_path / "other"
    held_out = "validation/tokens.bin"
    if rewritten:
        assert (one / "train/tokens.bin").read_bytes() == (other / "train/tokens.bin").read_bytes()
        assert (one / held_out).read_bytes() != (other / held_out).read_bytes()
    store = s3_bucket.path / "store"
    objects.upload_folder(one, store)
    argv = flags("tiny", tmp_path / "run", data__sources=str(store), train__steps=2)
    environment = {
        "STORE": str(store),
        "OTHER": str(other if rewritten else one),
        "CACHES": str(tmp_path / "caches"),
        **s3_bucket.environment,
    }
    started = gang("stem_jax.train", argv, argv, changes=REWRITTEN, **environment)
    with started[0] as first, started[1] as second:
        said = [process.communicate(timeout=300)[0] for process in (first, second)]
    codes = [first.returncode, second.returncode]
    assert len(list((tmp_path / "caches").glob("*/*/train"))) == 2
    if not rewritten:
        assert codes == [0, 0], said
        return
    assert codes == [1, 1]
    expected = rf"process 1 differs from process 0 in the copy of {store}: .*; it was written"
    for text in said:
        assert re.search(expected, text), text[-3000:]


def test_a_second_run_is_refused(s3_bucket, tmp_path):
    workdir = s3_bucket.path / "run"
    first, second = (Machine(s3_bucket, tmp_path / name) for name in ("a", "b"))
    go_on = tmp_path / "go"
    argv = flags("tiny", workdir)
    with child("-c", HELD, "3", str(go_on), *argv, **first.environment) as process:
        while not objects.read_object(workdir / ".lock"):
            time.sleep(0.1)
        said = second.program("train", *argv, code=1)
        assert f"--workdir={workdir} is in use by process {process.pid} on host" in said
        go_on.touch()
        finish(process)


def test_a_bucket_that_vanishes_ends_the_run_in_a_line(s3_bucket, tmp_path):
    workdir = s3_bucket.path / "run"
    machine = Machine(s3_bucket, tmp_path / "a")
    argv = flags("tiny", workdir)
    go_on = tmp_path / "go"
    with child("-c", HELD, "6", str(go_on), *argv, **machine.environment) as process:
        while not (workdir / "checkpoints" / "4" / "commit_success.txt").exists():
            time.sleep(0.1)
        body = (
            b'<?xml version="1.0"?><Error><Code>NoSuchBucket</Code>'
            b"<Message>The specified bucket does not exist</Message></Error>"
        )
        s3_bucket.proxy.answers = [Answer(404, body)]
        go_on.touch()
        out, _ = process.communicate(timeout=300)
    last = out.strip().splitlines()[-1]
    assert process.returncode == 1, out[-3000:]
    assert last.startswith("error: ") and f"no bucket {s3_bucket.name}" in last, out[-3000:]
    [metrics] = machine.folder.rglob("metrics.jsonl")
    assert len(_records(metrics.read_text())) >= 8


@gs_nightly
def test_the_newest_checkpoint_is_not_listed(bucket, tmp_path):
    workdir = bucket.path / "run"
    machine, other = Machine(bucket, tmp_path / "a"), Machine(bucket, tmp_path / "b")
    machine.program("train", *flags("tiny", workdir, train__steps=8))
    bucket.proxy.hidden = ["checkpoints/8/"]
    go_on = tmp_path / "go"
    start = ["-c", HELD, "5", str(go_on), *flags("tiny", workdir)]
    with child(*start, **other.environment) as process:
        while not (list(other.folder.rglob("*_000.log")) and "resuming" in other.log()):
            time.sleep(0.1)
            assert process.poll() is None, process.communicate()
        # It comes into sight before it is written again.
        bucket.proxy.hidden = []
        go_on.touch()
        out = finish(process)
    assert "resuming from step 4" in out
    records = _records((workdir / "metrics.jsonl").read_text())
    assert [r["step"] for r in records if "train/loss" in r] == list(range(1, STEPS + 1))
    bucket.proxy.reset()
    assert objects.read_object(workdir / "checkpoints" / str(STEPS) / "commit_success.txt")


@gs_nightly
def test_a_damaged_checkpoint_is_set_aside(bucket, tmp_path):
    workdir = bucket.path / "run"
    machine = Machine(bucket, tmp_path / "a")
    machine.program("train", *flags("tiny", workdir, train__steps=8))
    newest = workdir / "checkpoints" / "8"
    lost = next(n for n in objects.list_objects(newest) if "/d/" in n)
    objects.remove_object(newest / lost)
    shutil.rmtree(machine.folder)
    out = machine.program("train", *flags("tiny", workdir))
    assert f"checkpoint 8 is damaged ({lost} is missing); moved to" in out
    assert "resuming from step 4" in out
    aside = objects.list_objects(workdir / "damaged_checkpoints" / "8")
    assert "files.json" in aside and "commit_success.txt" in aside


@gs_nightly
@pytest.mark.parametrize("config", ["tiny"], indirect=True)
def test_a_store_that_is_slow_and_fails_at_times(bucket, local_losses, config, tmp_path):
    workdir = bucket.path / "run"
    machine = Machine(bucket, tmp_path / "a")
    bucket.proxy.latency = 0.02
    bucket.proxy.answers = [Answer(503, times=5, method="PUT|POST|GET")]
    machine.program("train", *flags(config, workdir))
    assert _losses(_records((workdir / "metrics.jsonl").read_text())) == local_losses
