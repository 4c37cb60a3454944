"""The copy that a machine has of a run folder in a bucket: what is brought and sent, who wins."""

import shutil
import time

import pytest

from stem_jax import bucket as objects
from stem_jax import local_copy
from stem_jax.bucket_files import opened, upload_written
from stem_jax.errors import InputError
from stem_jax.local_copy import LocalCopy, address_of, checkpoints_of, uploading
from tests.buckets import Answer


@pytest.fixture
def address(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv(local_copy.VARIABLE, str(tmp_path / "copies"))
    return bucket.path / "runs" / "x"


def _copies(address, tmp_path) -> list[LocalCopy]:
    return [LocalCopy(address, tmp_path / name) for name in ("one", "two")]


def test_what_one_machine_wrote_another_has(address, tmp_path):
    one, two = _copies(address, tmp_path)
    (one.folder / "logs").mkdir()
    (one.folder / "logs" / "0.log").write_text("a")
    (one.folder / ".hidden").write_text("of this machine")
    one.upload()
    objects.put(address / "checkpoints" / "5" / "files.json", b"large")
    two.fetch()
    assert (two.folder / "logs" / "0.log").read_text() == "a"
    assert sorted(p.name for p in two.folder.iterdir()) == [".copy.json", "logs"]
    assert str(address_of(two.folder)) == str(address)
    assert str(checkpoints_of(two.folder)) == f"{address}/checkpoints"


def test_a_folder_of_runs_is_not_brought(address, bucket, tmp_path):
    for run in "abcd":
        objects.put(address / run / "checkpoints" / "5" / "files.json", b"large")
    bucket.proxy.reset()
    why = r"/runs/x: it has runs below it \(a, b, c and 1 more\); give the folder of one"
    with pytest.raises(InputError, match=why):
        LocalCopy(address, tmp_path / "copy").fetch()
    with pytest.raises(InputError, match=why):
        opened(str(address), "--workdir")
    assert not list((tmp_path / "copy").glob("*"))[1:]


def test_what_changed_alone_is_sent_and_brought(address, bucket, tmp_path):
    one, two = _copies(address, tmp_path)
    for name in "abc":
        (one.folder / name).write_text(name)
    one.upload()
    two.fetch()
    bucket.proxy.reset()
    (one.folder / "b").write_text("changed")
    one.upload()
    assert sum(method in ("PUT", "POST") for method, _ in bucket.proxy.paths) == 1
    # Nothing changed since: nothing is asked.
    bucket.proxy.reset()
    one.upload()
    assert not bucket.proxy.paths
    LocalCopy(address, two.folder).fetch()
    assert (two.folder / "b").read_text() == "changed"
    assert not any("/x/a" in path for _, path in bucket.proxy.paths)


def test_what_was_appended_here_and_not_sent_stays(address, tmp_path):
    """A run that was killed goes on on the same machine."""
    one, two = _copies(address, tmp_path)
    (one.folder / "metrics.jsonl").write_text("1\n")
    one.upload()
    (one.folder / "metrics.jsonl").write_text("1\n2\n")
    LocalCopy(address, one.folder).fetch()
    assert (one.folder / "metrics.jsonl").read_text() == "1\n2\n"
    # But if another machine went on meanwhile, its is the truth.
    two.fetch()
    (two.folder / "metrics.jsonl").write_text("1\nother\n")
    two.upload()
    LocalCopy(address, one.folder).fetch()
    assert (one.folder / "metrics.jsonl").read_text() == "1\nother\n"


def test_what_is_gone_in_one_place_goes_in_the_other(address, tmp_path):
    one, two = _copies(address, tmp_path)
    for name in "ab":
        (one.folder / name).write_text(name)
    one.upload()
    two.fetch()
    (one.folder / "a").unlink()
    one.upload()
    two.fetch()
    assert list(objects.list_objects(address)) == ["b"] and not (two.folder / "a").exists()


def test_a_copy_that_was_removed_takes_nothing_with_it(address, tmp_path):
    one, _ = _copies(address, tmp_path)
    (one.folder / "a").write_text("1")
    one.upload()
    shutil.rmtree(one.folder)
    one.folder.mkdir()
    (one.folder / "b").write_text("2")
    one.upload()
    assert list(objects.list_objects(address)) == ["a", "b"]


# Of gcsfs, which reads it whole.
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_a_large_file_may_grow_while_it_is_sent(address, tmp_path, monkeypatch):
    one, _ = _copies(address, tmp_path)
    path = one.folder / "metrics.jsonl"
    path.write_bytes(bytes(6 << 20))

    def sent_late(source, target):
        with path.open("ab") as file:
            file.write(b"more")
        assert source.stat().st_size == 6 << 20
        objects.upload(source, target)

    monkeypatch.setattr(local_copy, "upload", sent_late)
    one.upload()
    assert objects.stored_size(address / "metrics.jsonl") == 6 << 20
    monkeypatch.undo()
    one.upload()
    assert objects.stored_size(address / "metrics.jsonl") == (6 << 20) + 4
    assert [p.name for p in one.folder.iterdir() if "uploading" in p.name] == []


def test_a_file_that_is_brought_is_as_old_as_the_object(address, bucket, tmp_path):
    one, _ = _copies(address, tmp_path)
    objects.put(address / "a", b"1")
    time.sleep(1.5)
    one.fetch()
    assert time.time() - (one.folder / "a").stat().st_mtime >= 1.0


def test_uploads_go_on_while_it_is_written_and_come_at_the_end(address, tmp_path):
    one, _ = _copies(address, tmp_path)
    said: list[InputError] = []
    with uploading(one, 0.05, said.append):
        (one.folder / "a").write_text("1")
        while not objects.list_objects(address):
            pass
        (one.folder / "b").write_text("2")
    assert list(objects.list_objects(address)) == ["a", "b"] and not said


def test_the_first_failure_is_the_one_that_is_said(address, bucket, tmp_path):
    one, _ = _copies(address, tmp_path)
    (one.folder / "a").write_text("1")
    bucket.proxy.answers = [Answer(403, b"<Error><Code>AccessDenied</Code></Error>")]
    said: list[InputError] = []
    with pytest.raises(ZeroDivisionError), uploading(one, None, said.append):
        print(1 / 0)
    assert len(said) == 1 and "no permission" in str(said[0])
    with pytest.raises(InputError, match="no permission"), uploading(one, None, said.append):
        pass


def test_a_run_is_opened_for_reading(address, tmp_path):
    objects.put(address / "config.json", b"{}")
    with pytest.raises(
        InputError, match=r"^--workdir=.*: it has no checkpoint; give the folder of a"
    ):
        opened(str(address), "--workdir")
    objects.put(address / "checkpoints" / "5" / "files.json", b"{}")
    folder = opened(str(address), "--workdir")
    assert (folder / "config.json").read_text() == "{}"
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "x.json").write_text("1")
    upload_written()
    assert "evaluation/x.json" in objects.list_objects(address)
    assert opened(tmp_path, "--workdir") == tmp_path


def test_a_folder_of_this_machine_is_itself(tmp_path):
    assert address_of(tmp_path) == tmp_path
    assert checkpoints_of(tmp_path) == tmp_path.absolute() / "checkpoints"
