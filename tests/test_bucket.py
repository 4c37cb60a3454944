"""Objects of buckets, against servers on this machine: conditional writes, listings, folders."""

import time

import pytest
from etils import epath

from stem_jax import bucket as objects
from stem_jax.errors import InputError
from tests.buckets import Answer


def test_one_of_two_writes_an_object_that_was_absent(bucket):
    path = bucket.path / "run" / "lock"
    assert objects.put_if_absent(path, b"first")
    assert not objects.put_if_absent(path, b"second")
    assert objects.read_object(path).content == b"first"


def test_an_object_is_replaced_if_it_is_the_one_that_was_seen(bucket):
    path = bucket.path / "lock"
    assert objects.put_if_absent(path, b"first")
    seen = objects.read_object(path)
    assert objects.replace_if(path, b"second", seen.version)
    assert not objects.replace_if(path, b"third", seen.version)
    found = objects.read_object(path)
    assert found.content == b"second" and found.version != seen.version
    objects.remove_object(path)
    assert not objects.replace_if(path, b"fourth", found.version)
    assert objects.read_object(path) is None


def test_the_age_of_an_object_is_told_by_the_store(bucket, monkeypatch):
    path = bucket.path / "lock"
    objects.put_if_absent(path, b"x")
    # Of another host, whose clock is an hour ahead.
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600)
    assert 0 <= objects.read_object(path).age < 60
    monkeypatch.undo()
    time.sleep(1.1)
    assert 1 <= objects.read_object(path).age < 60


def test_whose_answer_was_lost_knows_that_it_wrote(bucket):
    """The second attempt after a 503 finds what the first one wrote."""
    path = bucket.path / "lock"
    objects.put(path, b"mine")
    assert objects.put_if_absent(path, b"mine")


def test_folders_go_there_and_back(bucket, tmp_path):
    folder = tmp_path / "from"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "one").write_bytes(b"1")
    (folder / "whole").write_bytes(b"yes")
    (folder / "a" / "empty").write_bytes(b"")
    target = bucket.path / "stores" / "x"
    objects.upload_folder(folder, target, last="whole")
    written = [path for method, path in bucket.proxy.paths if method in ("PUT", "POST")]
    assert len(written) == 3 and "whole" in written[-1]
    listed = objects.list_objects(target)
    assert {name: stored.size for name, stored in listed.items()} == {
        "a/b/one": 1,
        "a/empty": 0,
        "whole": 3,
    }
    objects.download_folder(target, tmp_path / "to")
    assert (tmp_path / "to" / "a" / "b" / "one").read_bytes() == b"1"
    assert (tmp_path / "to" / "whole").read_bytes() == b"yes"
    assert objects.stored_size(target / "whole") == 3
    # A name that begins like the folder's is not in it.
    objects.put(bucket.path / "stores" / "xyz", b"")
    objects.remove_folder(target)
    assert objects.list_objects(target) == {}
    assert list(objects.list_objects(bucket.path)) == ["stores/xyz"]


def test_what_another_client_wrote_is_listed(bucket):
    """TensorStore writes beside fsspec; a listing that was kept would not have it."""
    from stem_jax.bucket import list_objects, put

    folder = bucket.path / "f"
    put(folder / "a", b"1")
    assert list(list_objects(folder)) == ["a"] and list(folder.iterdir()) == [folder / "a"]
    bucket.write("f/b", b"2")
    assert list(list_objects(folder)) == ["a", "b"] and (folder / "b").exists()


def test_a_file_comes_whole_or_not_at_all(bucket, tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"as it was")
    with pytest.raises(FileNotFoundError):
        objects.download(bucket.path / "missing", target)
    assert target.read_bytes() == b"as it was" and list(tmp_path.iterdir()) == [target]


def test_a_burst_of_failures_is_outlasted(bucket):
    path = bucket.path / "x"
    bucket.proxy.answers = [Answer(503, times=2)]
    objects.put(path, b"1")
    assert objects.read_object(path).content == b"1"


def test_a_bucket_that_is_not_there(bucket, tmp_path):
    missing = epath.Path(f"{bucket.scheme}://no-such-bucket/run")
    (tmp_path / "file").write_bytes(b"1")
    for use in (
        lambda: objects.read_object(missing / "x"),
        lambda: objects.list_objects(missing),
        lambda: objects.put(missing / "x", b"1"),
        lambda: objects.put_if_absent(missing / "x", b"1"),
        lambda: objects.upload(tmp_path / "file", missing / "x"),
    ):
        with pytest.raises(InputError, match="there is no bucket no-such-bucket; create it"):
            use()


def test_what_is_refused_is_not_taken_for_absent(bucket):
    folder = bucket.path / "run"
    objects.put(folder / "a", b"content")
    assert objects.is_folder(folder) and not objects.is_folder(folder / "a")
    assert objects.read_file(folder / "a") == b"content" and objects.stored_size(folder / "a") == 7
    assert not objects.is_folder(folder / "b") and objects.stored_size(folder / "b") is None
    with pytest.raises(FileNotFoundError):
        objects.read_file(folder / "b")
    bucket.proxy.answers = [Answer(403, b"<Error><Code>AccessDenied</Code></Error>")]
    for ask in (objects.is_folder, objects.read_file, objects.stored_size):
        with pytest.raises(InputError, match="no permission for the bucket"):
            ask(folder / "a")
