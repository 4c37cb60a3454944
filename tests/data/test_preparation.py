"""What is prepared takes its place when it is whole; one process at a time; nothing is mixed up."""

import itertools
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from stem_jax.data import assembly, preparation
from stem_jax.data.corpora import read_corpus
from stem_jax.data.documents import Document
from stem_jax.data.preparation import Preparation, remove_unfinished
from stem_jax.data.prepare import open_stores, prepare_stores, write_stores
from stem_jax.data.sources import check_folder, open_sources, parse_sources
from stem_jax.data.token_store import TokenStore
from stem_jax.data.tokenizer import load_tokenizer, load_tokenizer_folder
from stem_jax.errors import BadRecord, InputError
from stem_jax.lock import Lock
from stem_jax.prepare import main

BYTES = load_tokenizer("bytes")
FACTS = {"name": "facts", "validation_fraction": 0.02, "seed": 0, "progress": False}


def _facts():
    return (Document(text, str(i)) for i, text in enumerate(read_corpus("facts")))


def _checksums(folder):
    stores = open_stores(folder, BYTES)
    return {split: store.meta.checksum for split, store in stores.items()}


def _prepare(folder, source, *flags):
    main([f"--input={source}", f"--out={folder}", "--json", *flags])


def test_a_refused_prepare_leaves_a_store_and_its_tokenizer(tmp_path, capsys):
    many, one = tmp_path / "many.jsonl", tmp_path / "one.txt"
    texts = list(itertools.islice(read_corpus("facts"), 400))
    many.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    one.write_text(" ".join(texts))
    out = tmp_path / "out"
    _prepare(out, many, "--vocab-size=400")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for source, flags in ((one, ["--vocab-size=410"]), (many, ["--vocab-size=1000000"])):
        with pytest.raises(InputError, match=r"single document|is too large"):
            _prepare(out, source, *flags)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    tokenizer = load_tokenizer_folder(out / "tokenizer")
    assert tokenizer.decode(open_stores(out, tokenizer)["train"].document_ids(0)) in texts
    (out / "tokenizer" / "tokenizer_meta.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer_meta\.json: it would be replaced"):
        _prepare(out, many, "--vocab-size=400")


@pytest.mark.parametrize("step", range(5))
def test_a_move_that_was_cut_is_ended_by_the_next_preparation(tmp_path, monkeypatch, step):
    """Wherever it is cut, the folder has the old store, or none, or the new one."""
    out = tmp_path / "out"
    prepare_stores([Document(t, "x") for t in ("a", "b")], BYTES, out, **FACTS)
    old, rename, moves = _checksums(out), Path.rename, itertools.count()

    def cut(self, target):
        if (out / ".prepare" / "complete").exists() and next(moves) == step:
            raise KeyboardInterrupt
        return rename(self, target)

    new = [Document(t, "x") for t in ("c", "d", "e")]
    job = {"a": "job"}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", cut)
        with pytest.raises(KeyboardInterrupt), Preparation(out, job) as place:
            write_stores(place, new, BYTES, **FACTS)
    if (out / "train").exists() and step < 4:
        assert _checksums(out) == old
    with Preparation(out, job) as place:
        assert place.finished
    stores = open_stores(out, BYTES)
    assert sum(store.num_documents for store in stores.values()) == 3
    assert not (out / ".prepare").exists()


def test_one_at_a_time_prepares_in_a_folder(tmp_path):
    with (
        Preparation(tmp_path, None),
        pytest.raises(InputError, match=rf"process {os.getpid()} on host .* prepares text in"),
    ):
        prepare_stores(_facts(), BYTES, tmp_path, **FACTS)


def test_a_run_waits_for_another_that_prepares_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preparation, "_WAIT_SECONDS", 0.05)
    specs, folder = parse_sources("facts"), tmp_path / "data"
    first = open_sources(specs, BYTES, folder, progress=False)[0].train
    target = first.folder.parent
    shutil.rmtree(target)
    target.mkdir()
    lock = Lock.take(target / ".prepare.lock")
    release = threading.Timer(0.5, lock.release)
    release.start()
    began = time.monotonic()
    (again,) = open_sources(specs, BYTES, folder, progress=False)
    release.join()
    assert time.monotonic() - began > 0.4 and again.train.meta == first.meta
    assert f"waiting for process {os.getpid()}" in capsys.readouterr().err


def test_runs_that_share_a_folder_have_each_their_own_stores(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.txt").write_text("more text")
    specs, folder = parse_sources(f"{tmp_path}/*.txt"), tmp_path / "data"

    def opened(**options):
        (source,) = open_sources(specs, BYTES, folder, progress=False, **options)
        return source.train

    first, other = opened(), opened(seed=1)
    assert first.folder != other.folder
    (tmp_path / "b.txt").write_text("text that was changed since")
    changed = opened()
    assert len({store.folder for store in (first, other, changed)}) == 3
    # A run that goes on reads what it was trained on, also when that has changed or gone.
    for kept in (first, changed):
        assert opened(keep=True, checksums=[kept.meta.checksum]).folder == kept.folder
    (tmp_path / "a.txt").unlink()
    assert opened(keep=True, checksums=[first.meta.checksum]).folder == first.folder


def _as_an_earlier_version(folder, name):
    """Stores as versions before 3 named them and wrote their records."""
    (made,) = folder.iterdir()
    record = json.loads((made / "source.json").read_text())
    for key in ("bos_id", "eos_id"):
        del record[key]
    (made / "source.json").write_text(json.dumps(record))
    made.rename(folder / name)


def test_stores_under_the_names_of_earlier_versions_are_read(tmp_path, monkeypatch):
    folder, specs = tmp_path / "data", parse_sources("facts")
    open_sources(specs, BYTES, folder, progress=False)
    _as_an_earlier_version(folder, "facts")

    def prepare(*_, **__):
        raise AssertionError("prepared again")

    monkeypatch.setattr("stem_jax.data.sources.write_stores", prepare)
    for keep in (False, True):
        (source,) = open_sources(specs, BYTES, folder, progress=False, keep=keep)
        assert source.train.folder == folder / "facts" / "train"
    with pytest.raises(AssertionError, match="prepared again"):
        open_sources(specs, BYTES, folder, progress=False, seed=1)


def test_what_was_taken_for_text_before_is_read_anew(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    specs, folder = parse_sources(f"{tmp_path}/a.json"), tmp_path / "data"
    (as_text,) = open_sources(specs, BYTES, folder, validation_fraction=0, progress=False)
    record = as_text.train.folder.parent / "source.json"
    assert json.loads(record.read_text())["by_content"] is True


def test_stopped_jobs_whose_text_has_changed_are_removed(tmp_path, monkeypatch):
    text, specs, folder = tmp_path / "a.txt", parse_sources(f"{tmp_path}/a.txt"), tmp_path / "data"
    text.write_text("some text")

    def stop(self, name, bad):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(assembly.Assembly, "finish", stop)
        open_sources(specs, BYTES, folder, validation_fraction=0, progress=False)
    (left,) = folder.iterdir()
    text.write_text("some other text")
    open_sources(specs, BYTES, folder, validation_fraction=0, progress=False)
    assert not left.exists() and len(list(folder.iterdir())) == 1


def test_bad_records_stop_a_prepare_or_are_left_out(tmp_path, capsys):
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text('{"text": "a"}\n{"text": null}\n{"text": "b"}\n')
    flags = ["--tokenizer=bytes", "--validation-fraction=0"]
    stops = r"a\.jsonl:2: field 'text' is null.*; --on-bad=skip leaves such records out$"
    with pytest.raises(BadRecord, match=stops):
        _prepare(out, path, *flags)
    _prepare(out, path, *flags, "--on-bad=skip")
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert (summary["documents"], summary["skipped_records"]) == (2, 1)
    assert "a.jsonl:2: field 'text'" in printed.err and "records left out: 1, see" in printed.err
    # Neither advises what was done.
    assert "--on-bad" not in printed.err + (out / "skipped.jsonl").read_text()
    assert json.loads((out / "skipped.jsonl").read_text())["place"] == f"{path}:2"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    _prepare(out, path, *flags, "--on-bad=skip")
    assert not (out / "skipped.jsonl").exists()


def test_a_corpus_of_bad_records_alone_says_why_nothing_is_left(tmp_path):
    path = tmp_path / "a.jsonl"
    flags = ["--tokenizer=bytes", "--on-bad=skip", "--text-field=txet"]
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    told = r"has no text.*; records left out: 2, first: .*a\.jsonl:1 has no field 'txet'"
    with pytest.raises(InputError, match=told):
        _prepare(tmp_path / "out", path, *flags)
    path.write_text('{"txet": "a"}\n{"text": "b"}\n')
    told = r"a single document.*; records left out: 1, first: .*a\.jsonl:2 has no field 'txet'"
    with pytest.raises(InputError, match=told):
        _prepare(tmp_path / "out", path, *flags)


def test_texts_that_a_tokenizer_cannot_take_are_bad_records(tmp_path, monkeypatch, capsys):
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text('{"text": "a"}\n{"text": "bad"}\n{"text": "b"}\n')
    encode = type(BYTES).encode

    def refuse(self, text):
        if text == "bad":
            raise BadRecord("cannot be spelled")
        return encode(self, text)

    monkeypatch.setattr(type(BYTES), "encode", refuse)
    flags = ["--tokenizer=bytes", "--validation-fraction=0"]
    with pytest.raises(BadRecord, match=r"a\.jsonl:2: cannot be spelled"):
        _prepare(out, path, *flags)
    _prepare(out, path, *flags, "--on-bad=skip")
    assert json.loads(capsys.readouterr().out)["documents"] == 2
    assert json.loads((out / "skipped.jsonl").read_text())["place"] == f"{path}:2"


def test_verify_reads_every_file(tmp_path, capsys):
    out = tmp_path / "out"
    main(["--corpus=facts", "--tokenizer=bytes", f"--out={out}", "--json"])
    made = json.loads(capsys.readouterr().out)
    main(["--verify", f"--out={out}", "--json"])
    verified = json.loads(capsys.readouterr().out)
    assert verified["tokens"] == made["tokens"]
    for split, name in itertools.product(
        ("train", "validation"), ("tokens.bin", "documents.bin", "bytes.bin")
    ):
        path = out / split / name
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 4
        path.write_bytes(raw)
        with pytest.raises(InputError, match=rf"{split}.*was damaged"):
            main(["--verify", f"--out={out}"])
        raw[len(raw) // 2] ^= 4
        path.write_bytes(raw)
    with pytest.raises(SystemExit):
        main(["--verify", "--corpus=facts", f"--out={out}"])
    with pytest.raises(InputError, match="holds no token store"):
        main(["--verify", f"--out={tmp_path / 'none'}"])
    TokenStore.open(out / "train", verify=True)


def test_verify_says_what_training_says_of_a_folder_without_stores(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(assembly.Assembly, "finish", _interrupt)
        main(["--corpus=facts", "--tokenizer=bytes", f"--out={out}"])
    stopped = "a folder without train/meta.json, in which a prepare was stopped: the same prepare"
    with pytest.raises(InputError, match=f"^--out={out} is {stopped} command goes on"):
        main(["--verify", f"--out={out}"])
    with pytest.raises(InputError, match=f"^source '{out}' is {stopped} command goes on"):
        check_folder(str(out))
    main(["--corpus=facts", "--tokenizer=bytes", f"--out={out}"])
    with pytest.raises(InputError, match=r"train is a .*one split: give the folder that has train"):
        main(["--verify", f"--out={out / 'train'}"])


def _interrupt(*_):
    raise KeyboardInterrupt


def test_processes_below_one_are_refused(tmp_path):
    with pytest.raises(InputError, match="--processes=0 must be at least 1"):
        main(["--corpus=facts", "--tokenizer=bytes", f"--out={tmp_path / 'o'}", "--processes=0"])


@pytest.mark.parametrize("name", ["source.json", "skipped.jsonl"])
@pytest.mark.parametrize("content", ['{"mine": 1}\n', "no JSON", '{"place": "a", "reason": "b"}\n'])
def test_files_of_others_with_names_of_ours_are_kept(tmp_path, name, content):
    text, out = tmp_path / "a.txt", tmp_path / "out"
    text.write_text("some text")
    out.mkdir()
    (out / name).write_text(content)
    flags = ["--tokenizer=bytes", "--validation-fraction=0"]
    refusal = rf"{name} exists and is not of a token store: .* move it away, or write elsewhere"
    with pytest.raises(InputError, match=refusal):
        _prepare(out, text, *flags)
    assert [path.name for path in out.iterdir()] == [name]
    (out / name).rename(tmp_path / name)
    _prepare(out, text, *flags)
    before = _checksums(out)
    (tmp_path / name).rename(out / name)
    if name == "skipped.jsonl" and "place" in content:
        # Beside a store it is that of the store.
        _prepare(out, text, *flags, "--seed=1")
        assert not (out / name).exists()
        return
    with pytest.raises(InputError, match=refusal):
        _prepare(out, text, *flags, "--seed=1")
    assert (out / name).read_text() == content and _checksums(out) == before


def test_the_record_of_a_source_is_replaced_with_its_stores(tmp_path):
    (source,) = open_sources(parse_sources("facts"), BYTES, tmp_path / "data", progress=False)
    folder = source.train.folder.parent
    prepare_stores(_facts(), BYTES, folder, **FACTS)
    assert not (folder / "source.json").exists()


def test_a_folder_that_others_remove_or_fill_at_the_same_time_ends_nothing(tmp_path, monkeypatch):
    with Preparation(tmp_path / "gone", None):
        shutil.rmtree(tmp_path / "gone")
    (tmp_path / "gone" / ".prepare").mkdir(parents=True)
    remove_unfinished([tmp_path / "gone"], lambda _: shutil.rmtree(tmp_path / "gone") is None)
    # It looks empty, and then somebody waits in it.
    filled = tmp_path / "filled"
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(()))
    with Preparation(filled, None):
        (filled / "theirs").touch()
    (filled / ".prepare").mkdir()
    remove_unfinished([filled], lambda _: True)
    assert os.listdir(filled) == ["theirs"]


def test_a_folder_that_goes_before_its_lock_is_made_again(tmp_path, monkeypatch):
    take, out = Lock.take, tmp_path / "out"

    def late(path):
        if not late.called:
            late.called = True
            out.rmdir()
        return take(path)

    late.called = False
    monkeypatch.setattr(Lock, "take", late)
    with Preparation(out, None) as place:
        assert place.new.is_dir()
