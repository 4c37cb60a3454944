"""Results go into a bucket whole: what makes them whole last, one at a time, on after a kill."""

import json

import pytest

from stem_jax import outgoing as module
from stem_jax import staging
from stem_jax.bucket import list_objects, put, read_object, remove_object
from stem_jax.data import remote_sources
from stem_jax.data.prepare import open_stores
from stem_jax.data.sources import open_sources, parse_sources
from stem_jax.data.tokenizer import load_tokenizer_folder
from stem_jax.errors import InputError
from stem_jax.outgoing import UNFINISHED, outgoing, outgoing_file
from stem_jax.prepare import main
from tests.buckets import Answer


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    remote_sources._stores.clear()
    for entry in list(staging._in_use):
        staging._give_back(entry)


def _make(target, names=("a", "deep/b", "whole"), content=b"1", keep=False):
    with outgoing(target, "--out", "whole", keep=keep) as folder:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if not keep or not (folder / name).exists():
                (folder / name).write_bytes(content)


def _killed_at(monkeypatch, name):
    """Whoever uploads is killed when that object comes."""
    upload = module.upload

    def killed(path, target):
        if target.name == name:
            raise KeyboardInterrupt
        upload(path, target)

    monkeypatch.setattr(module, "upload", killed)


def _written(bucket):
    return [path for method, path in bucket.proxy.paths if method in ("PUT", "POST")]


def test_what_makes_it_whole_comes_last(bucket, tmp_path):
    target = bucket.path / "out"
    _make(target)
    assert list(list_objects(target)) == ["a", "deep/b", "whole"]
    assert UNFINISHED in _written(bucket)[0] and "whole" in _written(bucket)[-1]
    # Nothing stays on this machine.
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []
    with pytest.raises(InputError, match=r"^--out=.*/out exists; choose another name"):
        _make(target)
    _make(bucket.path / "ou")
    for key in ("parts/x", "file"):
        put(bucket.path / key, b"mine")
        with pytest.raises(InputError, match="exists; choose another name, or remove it first"):
            _make(bucket.path / key.partition("/")[0])


def test_a_block_that_fails_leaves_nothing_in_the_bucket(s3_bucket):
    with pytest.raises(RuntimeError), outgoing(s3_bucket.path / "out", "--out", "whole") as folder:
        folder.mkdir()
        (folder / "a").write_bytes(b"1")
        raise RuntimeError
    assert list_objects(s3_bucket.path) == {}


def test_an_upload_that_was_killed_goes_on(bucket, monkeypatch):
    target = bucket.path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _killed_at(patch, "b")
        _make(target)
    assert list(list_objects(target)) == [UNFINISHED, "a"]
    bucket.proxy.reset()
    _make(target, keep=True)
    assert [path for path in _written(bucket) if path.endswith("/a")] == []
    assert list(list_objects(target)) == ["a", "deep/b", "whole"]


def test_one_that_begins_anew_leaves_nothing_of_the_one_before(s3_bucket, monkeypatch):
    target = s3_bucket.path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _killed_at(patch, "b")
        _make(target)
    _make(target, ("c", "deep/b", "whole"), b"2")
    assert list(list_objects(target)) == ["c", "deep/b", "whole"]
    assert read_object(target / "deep" / "b").content == b"2"


def test_another_machine_is_at_it(bucket):
    target = bucket.path / "out"
    put(target / UNFINISHED, json.dumps({"host": "far", "folder": "/x"}).encode())
    with pytest.raises(InputError, match=r"is being written on host far; wait for that") as said:
        _make(target)
    assert "\n" not in str(said.value)
    remove_object(target / UNFINISHED)
    with outgoing(target, "--out", "whole") as folder:
        folder.mkdir()
        (folder / "whole").write_bytes(b"mine")
        with pytest.raises(InputError, match=r"is being written by process \d+ on host"):
            _make(target)


def test_another_machine_was_faster(bucket):
    target = bucket.path / "out"
    with (
        pytest.raises(InputError, match="is being written by another process"),
        outgoing(target, "--out", "whole") as folder,
    ):
        folder.mkdir()
        (folder / "whole").write_bytes(b"mine")
        put(target / UNFINISHED, b"theirs")
    assert list(list_objects(target)) == [UNFINISHED]


def test_a_file(bucket):
    target = bucket.path / "patches" / "x.safetensors"
    with outgoing_file(target, "--out") as path:
        assert path.name == "x.safetensors"
        path.write_bytes(b"1")
    assert read_object(target).content == b"1"
    with pytest.raises(InputError, match="exists; choose"), outgoing_file(target, "--out"):
        pass


def test_a_bucket_that_is_not_there_or_not_allowed(bucket):
    with pytest.raises(InputError, match="there is no bucket no-such-bucket"):
        _make(type(bucket.path)(f"{bucket.scheme}://no-such-bucket/out"))
    bucket.proxy.answers = [Answer(403, method="PUT|POST")]
    with pytest.raises(InputError, match="no permission for the bucket") as said:
        _make(bucket.path / "out")
    assert "\n" not in str(said.value)


def _prepare(target, capsys):
    main(["--corpus=facts", "--tokenizer=bytes", f"--out={target}", "--json", "--processes=1"])
    return json.loads(capsys.readouterr().out)


# Of gcsfs, which sends a megabyte at once.
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_a_store_is_prepared_into_a_bucket(bucket, tmp_path, monkeypatch, capsys):
    target = bucket.path / "store"
    here = _prepare(tmp_path / "store", capsys)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _killed_at(patch, "tokens.bin")
        _prepare(target, capsys)
    capsys.readouterr()
    assert "train/meta.json" not in list_objects(target)
    with pytest.raises(InputError, match="is a folder without train/meta"):
        open_sources(parse_sources(str(target)), None, "x")
    there = _prepare(target, capsys)
    # It was made before it was killed.
    assert there == {**here, "out": str(target), "pieces": 0}
    bytes_ = load_tokenizer_folder(tmp_path / "store" / "tokenizer")
    (opened,) = open_sources(parse_sources(str(target)), bytes_, "x")
    assert opened.train.meta == open_stores(tmp_path / "store", bytes_)["train"].meta
    with pytest.raises(InputError, match=r"store exists; choose another name"):
        _prepare(target, capsys)
