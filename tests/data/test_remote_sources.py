"""Sources in buckets: stores are copied whole and checked; what is written meanwhile is noticed."""

import json
import os
import shutil
import time

import numpy as np
import pytest

from stem_jax import staging
from stem_jax.bucket import put, remove_object, upload_folder
from stem_jax.data import remote_sources
from stem_jax.data.documents import Document, find_files
from stem_jax.data.prepare import prepare_stores
from stem_jax.data.sources import check_folder, is_store_folder, open_sources, parse_sources
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.errors import InputError
from stem_jax.lock import Lock
from tests.buckets import Answer

BYTES = load_tokenizer("bytes")
OPTIONS = {"name": "t", "validation_fraction": 0.2, "seed": 0, "progress": False}


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    """A cache of the test's own, and of nothing opened before."""
    monkeypatch.setenv(staging.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(staging, "_AGAIN_SECONDS", 0.01)
    yield
    _forget()


def _forget():
    """As a new process begins."""
    remote_sources._stores.clear()
    for entry in list(staging._in_use):
        staging._give_back(entry)


def _store(folder, texts="abcdefghij"):
    prepare_stores([Document(text * 50, text) for text in texts], BYTES, folder, **OPTIONS)
    return folder


def _opened(address):
    return open_sources(parse_sources(str(address)), BYTES, "unused", progress=False)


def _downloads(bucket):
    return [path for method, path in bucket.proxy.paths if method == "GET" and "tokens.bin" in path]


def test_a_store_in_a_bucket_is_what_was_prepared(bucket, tmp_path):
    local = _store(tmp_path / "store")
    upload_folder(local, bucket.path / "store", last="train/meta.json")
    address = bucket.path / "store"
    (here,), (there,) = (open_sources(parse_sources(str(p)), BYTES, "x") for p in (local, address))
    assert there.source == str(address)
    for ours, theirs in ((here.train, there.train), (here.validation, there.validation)):
        assert ours.meta == theirs.meta
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    bucket.proxy.reset()
    _opened(address)
    # The next process has the copy, too.
    _forget()
    (again,) = _opened(address)
    assert again.train.folder == there.train.folder and _downloads(bucket) == []
    mixture = f"{local}=0.25,{address}=0.75"
    assert [s.weight for s in open_sources(parse_sources(mixture), BYTES, "x")] == [0.25, 0.75]


def test_a_store_that_was_written_anew_gets_a_copy_of_its_own(s3_bucket, tmp_path):
    address = s3_bucket.path / "store"
    upload_folder(_store(tmp_path / "one"), address)
    (one,) = _opened(address)
    upload_folder(_store(tmp_path / "two", "klmnopqrst"), address)
    # A process goes on with what it began with.
    (same,) = _opened(address)
    assert same.train.folder == one.train.folder
    remote_sources._stores.clear()
    (two,) = _opened(address)
    assert two.train.meta.checksum != one.train.meta.checksum
    assert one.train.ids(0, 5).tolist() == same.train.ids(0, 5).tolist()


@pytest.mark.long
def test_a_store_that_changes_under_the_download_is_downloaded_again(bucket, tmp_path, monkeypatch):
    address = bucket.path / "store"
    upload_folder(_store(tmp_path / "one"), address)
    _store(tmp_path / "two", "klmnopqrst")
    download, changes = staging.download, []

    def change(path, target):
        download(path, target)
        if len(changes) < wanted:
            number = len(changes)
            changes.append(str(path))
            source = tmp_path / "two"
            upload_folder(source, address)
            # Of gs each writing is a version; S3 tells them by their content.
            put(address / "train" / "bytes.bin", bytes([number]) * 8)
            if len(changes) == wanted and wanted == 1:
                upload_folder(source, address)

    monkeypatch.setattr(staging, "download", change)
    wanted = 1
    (opened,) = _opened(address)
    assert len(changes) == 1
    assert opened.train.num_documents + opened.validation.num_documents == 10
    assert opened.train.document_ids(0)[1] >= ord("k")
    _forget()
    shutil.rmtree(staging.staging_folder())
    changes.clear()
    wanted = 1000
    with pytest.raises(InputError, match="is written while it is read; start again when") as said:
        _opened(address)
    assert "\n" not in str(said.value)
    assert not list(staging.staging_folder().glob("*.part"))


@pytest.mark.parametrize(
    "name", ["train/tokens.bin", "validation/documents.bin", "train/bytes.bin"]
)
def test_a_flipped_bit_in_the_bucket_is_named(bucket, tmp_path, name):
    address, local = bucket.path / "store", _store(tmp_path / "store")
    content = bytearray((local / name).read_bytes())
    content[len(content) // 2] ^= 1
    (local / name).write_bytes(content)
    upload_folder(local, address)
    with pytest.raises(InputError, match=rf"store is damaged in the bucket: .*{name[-9:]}") as said:
        _opened(address)
    assert "\n" not in str(said.value) and "cache" not in str(said.value)
    assert not list(staging.staging_folder().glob("*.part"))


def test_a_download_that_was_killed_goes_on(s3_bucket, tmp_path, monkeypatch):
    address = s3_bucket.path / "store"
    upload_folder(_store(tmp_path / "store"), address)
    download = staging.download

    def killed(path, target):
        if path.name == "meta.json" and path.parent.name == "validation":
            (target.parent / ".meta.json.0.part").write_bytes(b"{")
            raise KeyboardInterrupt
        download(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(staging, "download", killed)
        _opened(address)
    _forget()
    s3_bucket.proxy.reset()
    (opened,) = _opened(address)
    # What was whole is not fetched again, and nothing else is in the copy.
    [fetched] = _downloads(s3_bucket)
    assert "validation" in fetched
    assert {path.name for path in opened.train.folder.iterdir()} == {
        "meta.json",
        "tokens.bin",
        "documents.bin",
        "bytes.bin",
    }
    assert len(list(opened.validation.folder.iterdir())) == 4


def test_what_is_damaged_on_this_disk_is_downloaded_again(s3_bucket, tmp_path, monkeypatch):
    address, local = s3_bucket.path / "store", _store(tmp_path / "store")
    upload_folder(local, address)
    (opened,) = _opened(address)
    entry = opened.train.folder.parent
    _forget()
    part = entry.with_name(entry.name + ".part")
    entry.rename(part)
    size = (part / "train" / "tokens.bin").stat().st_size
    (part / "train" / "tokens.bin").write_bytes(bytes(size))
    (again,) = _opened(address)
    assert again.train.folder.parent == entry
    assert (entry / "train" / "tokens.bin").read_bytes() == (
        local / "train" / "tokens.bin"
    ).read_bytes()


def test_the_oldest_copies_leave_for_new_ones_but_for_those_in_use(
    s3_bucket, tmp_path, monkeypatch
):
    size = 0
    for name, texts in (("a", "abcdefghij"), ("b", "bcdefghijk"), ("c", "cdefghijkl")):
        upload_folder(_store(tmp_path / name, texts), s3_bucket.path / name)
        size = sum(path.stat().st_size for path in (tmp_path / name).rglob("*") if path.is_file())
    monkeypatch.setenv(staging.BOUND, str(2.5 * size / 2**30))
    a = _opened(s3_bucket.path / "a")[0].train.folder
    _opened(s3_bucket.path / "b")
    with pytest.raises(InputError, match=r"/c has .* MiB, .* more than there is room for") as said:
        _opened(s3_bucket.path / "c")
    assert staging.BOUND in str(said.value) and "\n" not in str(said.value)
    _forget()
    time.sleep(0.01)
    # Used last, though it came first.
    _opened(s3_bucket.path / "a")
    _forget()
    _opened(s3_bucket.path / "c")
    found = {path.name[-18] for path in staging.staging_folder().iterdir() if "." not in path.name}
    assert a.exists() and len(list(staging.staging_folder().glob("*.json"))) == 2, found
    # Another process's.
    _forget()
    with Lock.join(a.parent.with_name(a.parent.name + ".use")):
        _opened(s3_bucket.path / "b")
    assert a.exists()
    monkeypatch.setenv(staging.BOUND, "many")
    _forget()
    with pytest.raises(InputError, match=f"{staging.BOUND}=many is not a size; give GiB"):
        _opened(s3_bucket.path / "a")


def test_a_full_disk_is_told_before_the_download(s3_bucket, tmp_path, monkeypatch):
    upload_folder(_store(tmp_path / "a"), s3_bucket.path / "a")
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="more than there is room for"):
        _opened(s3_bucket.path / "a")
    assert _downloads(s3_bucket) == []


def test_what_is_missing_or_not_allowed_is_said_in_one_line(bucket, tmp_path):
    address, local = bucket.path / "store", _store(tmp_path / "store")
    with pytest.raises(InputError, match="matches no object"):
        _opened(address)
    upload_folder(local, address)
    remove_object(address / "train" / "meta.json")
    with pytest.raises(InputError, match=r"is a folder without train/meta\.json: run prepare"):
        check_folder(str(address))
    assert not is_store_folder(str(address))
    with pytest.raises(InputError, match="there is no bucket no-such-bucket"):
        _opened(f"{bucket.scheme}://no-such-bucket/store")
    upload_folder(local, address)
    bucket.proxy.answers = [Answer(403, path="tokens.bin")]
    with pytest.raises(InputError, match=f"no permission for the bucket {bucket.name}") as said:
        _opened(address)
    assert "\n" not in str(said.value)
    bucket.proxy.answers = [Answer(503, times=2)]
    assert len(_opened(address)) == 1


@pytest.mark.parametrize("name", ["train/meta.json", "validation/meta.json"])
def test_a_listing_that_lacks_the_newest_object(bucket, tmp_path, name):
    """Without its validation it would be a store, too."""
    address = bucket.path / "store"
    upload_folder(_store(tmp_path / "store"), address)
    bucket.proxy.hidden = [name]
    with pytest.raises(InputError, match=f"has {name}, which the bucket does not list yet"):
        _opened(address)
    bucket.proxy.hidden = []
    assert _opened(address)[0].validation is not None


def test_text_in_a_bucket(bucket, tmp_path):
    for name in ("a.jsonl", "b.jsonl", "deep/er/c.jsonl", "d.txt", "[x].txt"):
        bucket.write(f"dir/{name}", json.dumps({"text": name}).encode() + b"\n")
    start = str(bucket.path / "dir")

    def found(pattern):
        return [path.name for path in find_files([f"{start}/{pattern}"])]

    assert found("*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert found("**/*.jsonl") == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert found("[!a].jsonl") == ["b.jsonl"] and found("?.txt") == ["d.txt"]
    assert found("d.txt") == ["d.txt"]
    with pytest.raises(InputError, match=r"dir/\*\.csv' matches no object"):
        found("*.csv")
    options = {"validation_fraction": 0, "progress": False}
    specs = parse_sources(f"{start}/*.jsonl=2")
    (opened,) = open_sources(specs, BYTES, tmp_path / "data", **options)
    assert BYTES.decode(opened.train.document_ids(0)) == "a.jsonl"
    before = os.stat(opened.train.folder / "meta.json").st_mtime_ns
    # The copy went away and came back.
    _forget()
    shutil.rmtree(staging.staging_folder())
    (opened,) = open_sources(specs, BYTES, tmp_path / "data", **options)
    assert os.stat(opened.train.folder / "meta.json").st_mtime_ns == before
