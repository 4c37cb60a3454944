"""Preparing over processes: one result for any number, nothing done twice, nothing half done."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import zstandard

from stem_jax.data import assembly, piece_encoder, preparation
from stem_jax.data.corpora import read_corpus
from stem_jax.data.documents import Document
from stem_jax.data.preparation import Preparation
from stem_jax.data.prepare import open_stores, prepare_stores, write_stores
from stem_jax.data.sources import open_sources, parse_sources
from stem_jax.data.token_store import TokenStore
from stem_jax.data.tokenizer import load_tokenizer, load_tokenizer_folder
from stem_jax.errors import BadRecord, InputError, TrainingError
from stem_jax.lock import Lock
from stem_jax.prepare import main

BYTES = load_tokenizer("bytes")
ROOT = Path(__file__).parent.parent
# Of the facts, in bytes, with 2% held out, as versions before pieces wrote them.
CHECKSUMS = {"train": "d59318e8f6cf4e6a", "validation": "329c77149f0bef5a"}
FACTS = {"name": "facts", "validation_fraction": 0.02, "seed": 0, "progress": False}


def _facts():
    return (Document(text, str(i)) for i, text in enumerate(read_corpus("facts")))


def _checksums(folder):
    stores = open_stores(folder, BYTES)
    return {split: store.meta.checksum[:16] for split, store in stores.items()}


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(piece_encoder, "PIECE_CHARS", 50_000)


@pytest.mark.parametrize("processes", [1, 3])
def test_any_number_of_processes_gives_the_store_of_before(tmp_path, small_pieces, processes):
    prepare_stores(_facts(), BYTES, tmp_path / "out", processes=processes, **FACTS)
    assert _checksums(tmp_path / "out") == CHECKSUMS
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "validation"]


def test_what_is_held_back_for_an_empty_split_does_not_depend_on_pieces(tmp_path, monkeypatch):
    texts = [f"{'x' * (i % 7)}{i}" for i in range(40)]
    for number, fraction in enumerate([1e-9, 0.02, 1 - 1e-9]):
        results = []
        for chars in (1, 30, 10**6):
            monkeypatch.setattr(piece_encoder, "PIECE_CHARS", chars)
            out = tmp_path / f"{number}-{chars}"
            documents = (Document(text, "x") for text in texts)
            options = FACTS | {"validation_fraction": fraction}
            prepare_stores(documents, BYTES, out, processes=1, **options)
            results.append(_checksums(out))
        assert results[0] == results[1] == results[2]


def test_a_worker_encodes_as_this_process(tmp_path, small_pieces):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(itertools.islice(read_corpus("facts"), 200), trainer)
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer("hf", tmp_path / "tokenizer.json")
    texts = [f"{'word ' * 3000}a </s> in text {i}" for i in range(12)]
    documents = (Document(text, "x") for text in texts)
    options = FACTS | {"validation_fraction": 0}
    store = prepare_stores(documents, tokenizer, tmp_path / "out", processes=2, **options)["train"]
    for index, text in enumerate(texts):
        assert store.document_ids(index).tolist()[1:-1] == tokenizer.encode(text)


# Kills itself when some pieces are done, or says how many it made.
_DRIVER = """
import os, signal, sys
from stem_jax import cli, prepare
from stem_jax.data import assembly, piece_encoder
piece_encoder.PIECE_CHARS = 20_000
assembly._RECORD_SECONDS = float(sys.argv[2])
add, made, limit = assembly.Assembly.add, [], int(sys.argv[1])
number = getattr(signal, sys.argv[3])
def counted(self, index, content):
    add(self, index, content)
    made.append(index)
    if len(made) == limit:
        os.kill(os.getpid(), number)
assembly.Assembly.add = counted
del sys.argv[1:4]
cli.run(prepare.main)
"""


def _run(*flags, limit=0, record=0.0, number="SIGKILL"):
    command = [sys.executable, "-c", _DRIVER, str(limit), str(record), number, *flags, "--json"]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120
    )


@pytest.fixture
def shards(tmp_path):
    """JSON lines in two shards, one of them with most of the text."""
    texts = list(read_corpus("facts"))
    for name, part in (("a", texts[:300]), ("b", texts[300:])):
        raw = "".join(json.dumps({"text": text}) + "\n" for text in part).encode()
        (tmp_path / f"{name}.jsonl.zst").write_bytes(zstandard.compress(raw))
    return f"--input={tmp_path}/*.jsonl.zst"


@pytest.mark.parametrize(("share", "record"), [(0.5, 0.0), (0.9, 0.0), (0.5, 1e9)])
def test_a_kill_costs_no_finished_piece(tmp_path, shards, share, record):
    """record: seconds between two records: at once, or never."""
    flags = [shards, "--tokenizer=bytes", "--processes=2", f"--out={tmp_path / 'out'}"]
    killed = int(share * 36)
    done = _run(*flags, limit=killed, record=record)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != ".prepare.lock"] == [
        ".prepare"
    ]
    done = _run(*flags)
    summary = json.loads(done.stdout)
    assert 30 < summary["pieces"] < 45 and summary["resumed_pieces"] == killed
    assert _checksums(tmp_path / "out") == CHECKSUMS
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "tokenizer",
        "train",
        "validation",
    ]


def test_another_command_removes_the_pieces_and_other_processes_do_not(tmp_path, shards):
    flags = [shards, "--tokenizer=bytes", f"--out={tmp_path / 'out'}"]
    _run(*flags, "--processes=1", limit=9)
    summary = json.loads(_run(*flags, "--processes=2", limit=99).stdout)
    assert summary["resumed_pieces"] == 9
    _run(*flags, "--processes=1", limit=9)
    summary = json.loads(_run(*flags, "--seed=1", "--processes=1").stdout)
    assert summary["resumed_pieces"] == 0
    assert not (tmp_path / "out" / ".prepare").exists()


def test_sigterm_is_one_line_and_the_same_command_goes_on(tmp_path, shards):
    flags = [shards, "--tokenizer=bytes", "--processes=2", f"--out={tmp_path / 'out'}"]
    done = _run(*flags, limit=9, number="SIGTERM")
    assert done.returncode == 143
    assert done.stderr == (
        "error: stopped by SIGTERM; the same command goes on where this one was\n"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".prepare"]
    assert json.loads(_run(*flags).stdout)["resumed_pieces"] == 9


def test_ctrl_c_is_one_line(tmp_path, shards):
    flags = [shards, "--tokenizer=bytes", "--processes=2", f"--out={tmp_path / 'out'}"]
    done = _run(*flags, limit=9, number="SIGINT")
    assert done.returncode != 0 and done.stderr.count("\n") == 1
    assert json.loads(_run(*flags).stdout)["resumed_pieces"] == 9


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path, small_pieces, monkeypatch):
    job, add = {"made from": "facts"}, assembly.Assembly.add

    def write(documents):
        with Preparation(tmp_path / "out", job) as place:
            return write_stores(place, documents, BYTES, processes=1, **FACTS)

    def full(self, index, content):
        if index == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, index, content)

    monkeypatch.setattr(assembly.Assembly, "add", full)
    with pytest.raises(InputError, match=r"no space left for .*out: free some, and the same"):
        write(_facts())
    monkeypatch.setattr(assembly.Assembly, "add", add)
    pieces, resumed = write(_facts())
    assert resumed == 4 < pieces
    assert _checksums(tmp_path / "out") == CHECKSUMS


def test_a_worker_that_is_killed_is_told_and_costs_nothing_else(
    tmp_path, small_pieces, monkeypatch
):
    started, start = [], subprocess.Popen

    def remember(*args, **kwargs):
        started.append(start(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", remember)
    add = assembly.Assembly.add

    def kill(self, index, content):
        add(self, index, content)
        if index == 3:
            started[0].kill()

    monkeypatch.setattr(assembly.Assembly, "add", kill)
    with (
        pytest.raises(TrainingError, match=r"was killed by signal 9.*fewer --processes"),
        Preparation(tmp_path / "out", {"a": "job"}) as place,
    ):
        write_stores(place, _facts(), BYTES, processes=1, **FACTS)
    assert started[0].poll() is not None
    assert len(list((tmp_path / "out" / ".prepare" / "pieces").iterdir())) >= 3


def test_a_damaged_piece_is_made_again(tmp_path, small_pieces, monkeypatch):
    def stop(self, name):
        raise KeyboardInterrupt

    job = {"a": "job"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(assembly.Assembly, "finish", stop)
        patch.setattr(assembly, "_RECORD_SECONDS", 1e9)
        with Preparation(tmp_path / "out", job) as place:
            write_stores(place, _facts(), BYTES, processes=1, **FACTS)
    pieces = sorted((tmp_path / "out" / ".prepare" / "pieces").iterdir())
    pieces[2].write_bytes(pieces[2].read_bytes()[:-9])
    pieces[5].write_bytes(b"")
    with Preparation(tmp_path / "out", job) as place:
        found, resumed = write_stores(place, _facts(), BYTES, processes=1, **FACTS)
    assert resumed == found - 2
    assert _checksums(tmp_path / "out") == CHECKSUMS


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

    def stop(self, name):
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
    with pytest.raises(BadRecord, match=r"a\.jsonl:2: field 'text' is a NoneType.*--on-bad=skip"):
        _prepare(out, path, *flags)
    _prepare(out, path, *flags, "--on-bad=skip")
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert (summary["documents"], summary["skipped_records"]) == (2, 1)
    assert "a.jsonl:2: field 'text'" in printed.err and "1 records were left out" in printed.err
    assert json.loads((out / "skipped.jsonl").read_text())["place"] == f"{path}:2"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    _prepare(out, path, *flags, "--on-bad=skip")
    assert not (out / "skipped.jsonl").exists()


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


def test_processes_below_one_are_refused(tmp_path):
    with pytest.raises(InputError, match="--processes=0 must be at least 1"):
        main(["--corpus=facts", "--tokenizer=bytes", f"--out={tmp_path / 'o'}", "--processes=0"])
