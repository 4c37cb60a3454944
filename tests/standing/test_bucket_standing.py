"""How a run in a bucket stands: as old as what was sent last, and what is missing there."""

import json
import time

import pytest

from stem_jax import bucket, status
from stem_jax.bucket_lock import BucketLock
from stem_jax.goodput.progress import KeptProgress
from stem_jax.goodput.start_record import record_path
from stem_jax.local_copy import VARIABLE, LocalCopy


@pytest.fixture
def said(s3_bucket, tmp_path, monkeypatch, capsys):
    """What the program says of the run."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "copies"))

    def ask(*flags: str) -> str:
        status.main([f"--workdir={s3_bucket.path}/run", *flags])
        return capsys.readouterr().out

    return ask


def test_it_is_as_old_as_the_last_upload(s3_bucket, tmp_path, said, monkeypatch):
    address = s3_bucket.path / "run"
    copy = LocalCopy(address, tmp_path / "own")
    progress = KeptProgress(copy.folder, 0, 1, time.monotonic() - 20)
    progress.began(0, 10, 100)
    for step in range(1, 6):
        progress.step_done(step, 2.0, 0.5)
    checkpoint = address / "checkpoints" / "4"
    files = {"d/one": [3, 0], "d/two": [3, 0]}
    bucket.put(checkpoint / "files.json", json.dumps({"crc32": 0, "files": files}).encode())
    for name in ("d/one", "d/two", "commit_success.txt"):
        bucket.put(checkpoint / name, b"abc")
    with BucketLock.take(address / ".lock"):
        copy.upload()
        assert ", as of " in said().splitlines()[0] and "damaged" not in said()
        # Another host's, by the time of the upload; between two of them nothing is heard.
        path = record_path(copy.folder, 0)
        record = json.loads(path.read_text()) | {"boot": "other"}
        path.write_text(json.dumps(record) + "\n")
        copy.upload()
        now = time.time()
        monkeypatch.setattr("time.time", lambda: now + 150)
        found = json.loads(said("--json"))
        assert found["state"] == "running" and 149 < found["as_of"] < 160
        assert " on host " in found["why"] and "more" not in found["why"]
        head = said().splitlines()[0]
        assert f", as of {found['as_of']:.0f} s ago" in head
        # Beyond the minute between two uploads.
        assert json.loads(said("--json", "--stuck-after=100"))["state"] == "running"
        assert json.loads(said("--json", "--stuck-after=80"))["state"] == "stuck"
        monkeypatch.setattr("time.time", lambda: now + 300)
        assert json.loads(said("--json"))["state"] == "stuck"
    bucket.remove_object(checkpoint / "d" / "two")
    assert "newest 4, of 4; 4 is damaged: d/two is missing" in said()
    progress.close(None)
