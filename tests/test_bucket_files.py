"""Files of buckets that flags name: brought before the work, sent after it, named in messages."""

import pytest

from stem_jax import bucket as objects
from stem_jax import local_copy
from stem_jax.bucket_files import as_given, fetched, result, seen, shown, upload_written
from stem_jax.errors import InputError


@pytest.fixture(autouse=True)
def copies(tmp_path, monkeypatch):
    monkeypatch.setenv(local_copy.VARIABLE, str(tmp_path / "copies"))


def test_a_file_is_brought(bucket, tmp_path):
    objects.put(bucket.path / "p.safetensors", b"rows")
    path = fetched(f"{bucket.path}/p.safetensors", "--edits")
    assert path.read_bytes() == b"rows" and path.name == "p.safetensors"
    assert as_given(f"patch {path} is none") == f"patch {bucket.path}/p.safetensors is none"
    with pytest.raises(InputError, match=r"--edits=.*/q: there is no such object; correct the"):
        fetched(f"{bucket.path}/q", "--edits")
    assert fetched("a/b", "--edits") == result("a/b", "--out") == seen("a/b", "--x")
    assert shown("a/b") == "a/b"


def test_results_are_sent_when_all_is_done(bucket):
    file, folder = f"{bucket.path}/x/e.json", f"{bucket.path}/x/editing"
    path, into = result(file, "--out"), result(folder, "--out")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("1")
    (into / "deep").mkdir(parents=True)
    (into / "deep" / "f.csv").write_text("2")
    assert shown(into / "deep" / "f.csv") == f"{folder}/deep/f.csv" and shown(path) == file
    assert not objects.list_objects(bucket.path)
    upload_written()
    assert list(objects.list_objects(bucket.path)) == ["x/e.json", "x/editing/deep/f.csv"]
    # What is there is gone on with; nothing stays on this machine.
    assert not path.exists() and not into.exists()
    assert result(file, "--out").read_text() == "1"
    upload_written()


def test_a_run_without_a_checkpoint_is_seen(bucket):
    with pytest.raises(InputError, match=r"--workdir=.*/run: nothing is there; correct the name"):
        seen(f"{bucket.path}/run", "--workdir")
    objects.put(bucket.path / "run" / "config.json", b"{}")
    folder = seen(f"{bucket.path}/run", "--workdir")
    assert (folder / "config.json").read_text() == "{}" and shown(folder) == f"{bucket.path}/run"
    upload_written()
