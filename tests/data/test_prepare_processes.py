"""Preparing over processes: one result for any number, and nothing is done twice after a kill."""

import errno
import itertools
import json
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import zstandard

from stem_jax.data import assembly, encoder_pool, piece_encoder
from stem_jax.data.corpora import read_corpus
from stem_jax.data.documents import Document
from stem_jax.data.preparation import Preparation
from stem_jax.data.prepare import open_stores, prepare_stores, write_stores
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.errors import InputError, TrainingError

BYTES = load_tokenizer("bytes")
ROOT = Path(__file__).parents[2]
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


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(tmp_path, shards):
    flags = [shards, "--tokenizer=bytes", "--processes=2", f"--out={tmp_path / 'out'}"]
    done = _run(*flags, limit=9, number="SIGINT")
    assert done.returncode == -signal.SIGINT
    assert done.stderr == "interrupted; the same command goes on where this one was\n"
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


@pytest.mark.parametrize("step", ["send", "receive"])
def test_whatever_goes_wrong_between_processes_ends_the_wait(
    tmp_path, small_pieces, monkeypatch, step
):
    do = getattr(encoder_pool, step)

    def fail(file, *message):
        # The encoder goes out, no piece comes in.
        if not isinstance((message or [None])[0], encoder_pool.PieceEncoder):
            raise pickle.UnpicklingError("not a message")
        return do(file, *message)

    monkeypatch.setattr(encoder_pool, step, fail)
    failed = []

    def prepare():
        try:
            prepare_stores(_facts(), BYTES, tmp_path / "out", processes=1, **FACTS)
        except RuntimeError as error:
            failed.append(str(error))

    # Where nobody tells of it, the thread waits for ever.
    thread = threading.Thread(target=prepare, daemon=True)
    thread.start()
    thread.join(30)
    assert failed and "not a message" in failed[0]


def test_a_damaged_piece_is_made_again(tmp_path, small_pieces, monkeypatch):
    def stop(self, name, bad):
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
