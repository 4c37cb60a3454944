"""Results of runs in a bucket are those of the same runs here; who may not write is told so."""

import contextlib
import json
import os
import signal
import threading
from pathlib import Path

import httpx
import pytest

from stem_jax import analyze, export, serve, train
from stem_jax import bucket as objects
from stem_jax.bucket_files import upload_written
from stem_jax.errors import InputError
from stem_jax.local_copy import VARIABLE
from stem_jax.run_saves import RunSaves
from stem_jax.standing.standing import standing
from stem_jax.work_folder import own_copy
from tests import launching
from tests.buckets import Answer
from tests.children import free_port, train_flags

VALUES = launching.SMALL | {"train.steps": 2, "checkpoint.every": 1, "train.global_batch_size": 8}
DENIED = Answer(
    403, b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>no</Message></Error>'
)


@pytest.fixture(autouse=True)
def _copies(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "copies"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    upload_written()


def trained(workdir, **overrides):
    train.main(train_flags("tiny", workdir, VALUES, overrides))
    return workdir


def files(folder) -> dict[str, bytes]:
    """What is in a folder here or in a bucket."""
    if isinstance(folder, Path):
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in objects.walk(folder)}
    return {name: objects.read_file(folder / name) for name in objects.list_objects(folder)}


@pytest.mark.long
@pytest.mark.little_effort
def test_exports_and_an_analysis(s3_bucket, tmp_path):
    base = trained(s3_bucket.path / "base")
    begun = {"train__init_from": str(base), "tables__weight_decay": 0}
    tuned = trained(s3_bucket.path / "tuned", optimizer__train="tables", **begun)
    adapted = trained(
        s3_bucket.path / "adapted", optimizer__train="backbone", lora__rank=2, **begun
    )
    for workdir, kind in ((base, "official"), (adapted, "peft")):
        for out in (s3_bucket.path / kind, tmp_path / kind):
            export.main([f"--workdir={workdir}", f"--format={kind}", f"--out={out}"])
        assert files(s3_bucket.path / kind) == files(tmp_path / kind) != {}
    for out in (s3_bucket.path / "patch", tmp_path / "patch"):
        export.main([f"--workdir={tuned}", "--format=patch", f"--out={out}"])
    assert objects.read_file(s3_bucket.path / "patch") == (tmp_path / "patch").read_bytes()
    analyze.main([f"--workdir={base}", "--tokens=512", "--no-progress"])
    upload_written()
    assert json.loads(objects.read_file(base / "analysis" / "analysis.json"))


@pytest.mark.long
@pytest.mark.little_effort
def test_it_is_served(s3_bucket):
    workdir = trained(s3_bucket.path / "run", train__steps=1)
    assert len(_served(workdir)["choices"]) == 1


def _served(workdir) -> dict:
    """What a server of the run answers, which is told to stop then."""
    port, answers = free_port(), []

    def ask() -> None:
        body = {"model": workdir.name, "prompt": "The", "max_tokens": 4}
        with httpx.Client(transport=httpx.HTTPTransport(), timeout=120) as client:
            launching.wait_until(lambda: _listens(port))
            answers.append(client.post(f"http://127.0.0.1:{port}/v1/completions", json=body).json())
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    serve.main([f"--workdir={workdir}", f"--port={port}", "--slots=1"])
    thread.join()
    return answers[0]


def _listens(port: int) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    return False


def test_no_permission_at_the_start(s3_bucket):
    workdir = s3_bucket.path / "run"
    s3_bucket.proxy.answers = [DENIED]
    with pytest.raises(InputError) as refused:
        trained(workdir)
    said = str(refused.value)
    assert said.startswith(f"--workdir={workdir}: no permission for the bucket {s3_bucket.name}")
    s3_bucket.proxy.reset()
    assert not objects.list_objects(workdir)


@pytest.mark.long
@pytest.mark.little_effort
def test_no_permission_in_the_middle(s3_bucket, monkeypatch):
    """The save ends the run; with the permission again, the same command goes on."""
    workdir, save = s3_bucket.path / "run", RunSaves.save

    def saving(self, state, *args):
        self.checkpoints.wait()
        if int(state.step) == 2:
            s3_bucket.proxy.answers = [DENIED]
        save(self, state, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RunSaves, "save", saving)
        with pytest.raises(InputError, match=f"no permission for the bucket {s3_bucket.name}"):
            trained(workdir)
    s3_bucket.proxy.reset()
    # The process lives on, but not the run.
    objects.remove_object(workdir / ".lock")
    assert standing(own_copy(workdir)).saves.steps == [1]
    trained(workdir)
    found = standing(own_copy(workdir))
    assert (found.state, found.saves.steps[-1], found.saves.damage) == ("complete", 2, None)
    log = (workdir / "logs" / "process_000.log").read_text()
    assert "resuming from step 1" in log


# Of aiohttp, about bodies of more than a mebibyte.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.long
@pytest.mark.little_effort
def test_rows_on_this_disk(gs_bucket, tmp_path):
    keys = {"tables__resident_rows": 128, "tables__host_rows": 64}
    keys |= {"tables__disk": str(tmp_path / "disk"), "train__seq_len": 8}
    workdir = trained(gs_bucket.path / "run", train__steps=1, **keys)
    trained(workdir, **keys)
    assert standing(own_copy(workdir)).saves.steps[-1] == 2
