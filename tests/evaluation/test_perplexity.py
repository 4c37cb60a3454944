"""Bits per byte of texts: training's own figures, counted by corpus and by position."""

import dataclasses
import itertools
import json
import math
import random
import shutil
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from stem_jax import cli, evaluate, train
from stem_jax.checkpoints.loading import load_run
from stem_jax.data.documents import Document
from stem_jax.data.prepare import prepare_stores
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.errors import InputError
from stem_jax.evaluation.perplexity import format_perplexity, perplexity
from stem_jax.evaluation.scoring import Scorer
from stem_jax.evaluation.training_text import open_training_text
from stem_jax.training.run_data import open_run_data, reading_of
from tests.children import train_flags
from tests.saved_models import BYTES
from tests.tokenizer_kinds import load_kind

CONTEXT = 32
FLAGS = {
    "data.tokenizer": "bytes",
    "data.validation_fraction": 0.2,
    "model.vocab_size": 258,
    "model.embed_dim": 32,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.ffn_dim": 48,
    "model.stem_layers": "1",
    "train.seq_len": CONTEXT,
    "train.steps": 30,
    "train.sample_prompt": "",
    "eval.every": 0,
    "eval.baselines": False,
    "checkpoint.every": 0,
}
WHOLE = {"name": "n", "validation_fraction": 0, "seed": 0, "progress": False}


def _texts(length):
    """Words in turn, cut to so many bytes."""
    rng = random.Random(0)
    words = "one two three four five six seven eight nine ten".split()
    for _ in range(60):
        first = rng.randrange(10)
        yield " ".join(words[(first + i) % 10] for i in range(20))[:length]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A model of texts that fill a row each, bos and eos included: no row begins inside one."""
    folder = tmp_path_factory.mktemp("words")
    source = folder / "words.jsonl"
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in _texts(CONTEXT - 2)))
    train.main(train_flags("tiny", folder / "run", FLAGS | {"data.sources": source}, {}))
    return folder / "run"


@pytest.fixture(scope="module")
def run(run_folder):
    return load_run(run_folder)


def test_the_loss_is_that_of_training(run_folder, run):
    (store,) = (run_folder / "data").iterdir()
    found = perplexity(run, [str(store)], progress=False)["corpora"][str(store)]
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    expected = [json.loads(line) for line in lines if "eval/loss" in line][-1]
    assert found["tokens"] == expected["eval/tokens"] > 100
    assert found["loss"] == pytest.approx(expected["eval/loss"], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(expected["eval/bits_per_byte"], rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_every_token_counts_once_in_the_place_where_it_was_scored(run, tmp_path):
    texts = ["short", "a longer text: äöü, " * 5, "x" * CONTEXT, "y" * (CONTEXT - 1)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    source = str(tmp_path / "*.jsonl")
    found = perplexity(run, [source], batch_size=3, progress=False)["corpora"][source]
    scorer, places = Scorer(run), {}
    for text in texts:
        ids = [BYTES.bos_id, *text.encode(), BYTES.eos_id]
        for start in range(0, len(ids) - 1, CONTEXT):
            window = ids[start : start + CONTEXT + 1]
            for place, value in enumerate(scorer.score([window])[0].log_likelihoods, start=1):
                places.setdefault(place, []).append(-float(value))
    assert found["documents"] == 4
    assert found["bytes"] == sum(len(text.encode()) for text in texts)
    assert found["tokens"] == found["bytes"] + 4 == sum(map(len, places.values()))
    everything = np.concatenate(list(places.values())).sum()
    assert found["loss"] == pytest.approx(everything / found["tokens"], rel=1e-5)
    edges = [(row["first"], row["last"]) for row in found["by_position"]]
    assert edges == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32)]
    for row in found["by_position"]:
        inside = np.concatenate([places[n] for n in range(row["first"], row["last"] + 1)])
        assert row["tokens"] == len(inside)
        assert row["loss"] == pytest.approx(inside.mean(), rel=1e-5)
    # eos has no bytes, everything else is text.
    assert sum(row["bytes"] for row in found["by_position"]) == found["bytes"]


def test_by_how_often_the_run_was_trained_on_a_token(run_folder, run):
    """Each token by itself, and counts from the batches, one after the other."""
    (store,) = (run_folder / "data").iterdir()
    name, counts = str(store), open_training_text(run, run_folder).pair_counts()
    batches = open_run_data(run.config, run_folder, prepared=True).batches
    times = np.zeros((2, 258), int)
    for step in range(30):
        batch = batches.batch(step)
        for times_V, key in zip(times, ("tokens", "targets"), strict=True):
            np.add.at(times_V, batch[key][batch["loss_mask"] == 1], 1)
    np.testing.assert_array_equal([counts.inputs_V, counts.targets_V], times)
    options = {"counts": counts, "by_document": True, "progress": False}
    found = perplexity(run, [name], **options)["corpora"][name]
    [held_out] = open_run_data(run.config, run_folder, prepared=True).held_out.stores
    scorer, nats, pairs = Scorer(run), [], []
    for document in range(held_out.num_documents):
        ids = held_out.document_ids(document).tolist()
        scores = -scorer.score([ids])[0].log_likelihoods.astype(np.float64)
        nats.append(scores.sum())
        pairs += zip(ids[:-1], ids[1:], scores.tolist(), strict=True)
    assert found["by_document"]["nats"] == pytest.approx(nats, rel=1e-5)
    assert found["by_document"]["bytes"] == held_out.document_bytes.tolist()
    for place, side in enumerate(("input", "target")):
        groups = found["by_frequency"][side]
        assert sum(g["tokens"] for g in groups) == len(pairs) == found["tokens"]
        total = sum(g["loss"] * g["tokens"] for g in groups)
        assert total == pytest.approx(sum(nats), rel=1e-5)
        assert sum(g["bytes"] for g in groups) == pytest.approx(found["bytes"])
        # Of each token the mean of those that were trained on as often, in their order.
        of_times = {}
        for pair in pairs:
            of_times.setdefault(times[place][pair[place]], []).append(pair[2])
        means = [np.mean(same) for _, same in sorted(of_times.items()) for _ in same]
        edges = [len(pairs) * group // 10 for group in range(11)]
        expected = [np.mean(means[a:b]) for a, b in itertools.pairwise(edges)]
        assert [g["loss"] for g in groups] == pytest.approx(expected, rel=1e-5)


def test_a_run_without_its_text_knows_no_counts(run_folder, run, tmp_path):
    copy = shutil.copytree(run_folder, tmp_path / "run")
    (store,) = (copy / "data").iterdir()
    meta = store / "train" / "meta.json"
    meta.write_text(meta.read_text().replace('"checksum": "', '"checksum": "0'))
    with pytest.raises(InputError, match=r"is not what checkpoint 30 of .*run was trained on"):
        open_training_text(run, copy)


def test_text_that_gives_a_special_token_is_refused(run, tmp_path):
    """Else a document would end inside of it; Unigram cannot spell "</s>" in another way."""
    path = tmp_path / "words.jsonl"
    path.write_text('{"text": "one </s> two"}\n')
    unigram = dataclasses.replace(run, tokenizer=load_kind("unigram", tmp_path))
    with pytest.raises(InputError, match=r"words\.jsonl:1: the text holds '</s>', which this"):
        perplexity(unigram, [str(path)], progress=False)


def test_text_that_no_token_stands_for_is_told(run, tmp_path):
    built = tokenizers.Tokenizer(models.BPE({"<eos>": 0, "a": 1, "b": 2}, []))
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(["<eos>"])
    built.save(str(tmp_path / "tokenizer.json"))
    lossy = load_tokenizer("hf", tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text("ab東")
    prepare_stores([Document("ab東", "0")] * 2, lossy, tmp_path / "store", **WHOLE)
    names = [str(tmp_path / "a.txt"), str(tmp_path / "store")]
    result = perplexity(dataclasses.replace(run, tokenizer=lossy), names, progress=False)
    for name in names:
        found = result["corpora"][name]
        assert (found["left_out"], found["left_out_example"]) == (pytest.approx(3 / 5), "東")
        told = f"{name}: the tokens leave out 60% of the text's bytes, first '東'"
        assert told in format_perplexity(result)
    assert "leave out" not in format_perplexity(perplexity(run, names[:1], progress=False))


def test_tables_name_corpora_and_positions(run, tmp_path):
    (tmp_path / "words.txt").write_text(" ".join(_texts(50)))
    (tmp_path / "short.txt").write_text("one two")
    names = [str(tmp_path / name) for name in ("words.txt", "short.txt")]
    table = format_perplexity(perplexity(run, [*names, "facts"], limit=2, progress=False))
    lines = table.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == [*names, "facts"]
    assert lines[5].startswith("tokens before")
    assert [line.split()[0] for line in lines[6:]] == ["1", "2", "3-4", "5-8", "9-16", "17-32"]
    # The short text does not get that far.
    assert lines[-1].split()[2] == "-" and lines[-1].split()[1] != "-"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{tmp}/none.txt", "none.txt' matches no file"),
        ("{tmp}/empty.txt", "empty.txt is empty"),
        ("{tmp}/blank.jsonl", "blank.jsonl has no text"),
        ("{tmp}", "is a folder without train/meta.json"),
    ],
)
def test_sources_are_refused_before_any_is_scored(run, tmp_path, monkeypatch, source, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')

    def score(*_):
        raise AssertionError("the device was asked")

    monkeypatch.setattr(Scorer, "score", score)
    with pytest.raises(InputError, match=message):
        perplexity(run, ["facts", source.format(tmp=tmp_path)], progress=False)
    with pytest.raises(InputError, match="--limit=0 must be at least 1"):
        perplexity(run, ["facts"], limit=0)


def test_files_are_read_as_the_run_reads_its_own_or_as_flags_say(run, tmp_path):
    (tmp_path / "a.json").write_text('{"body": "some text", "text": "other"}\n')
    source = str(tmp_path / "a.json")

    def size(run, reading=None):
        found = perplexity(run, [source], reading=reading, progress=False)
        return found["corpora"][source]["bytes"]

    data = dataclasses.replace(run.config.data, text_field="body")
    other = dataclasses.replace(run, config=dataclasses.replace(run.config, data=data))
    assert (size(run), size(other)) == (len("other"), len("some text"))
    assert size(run, reading_of(run.config.data, text_field="body")) == len("some text")
    whole = (tmp_path / "a.json").stat().st_size
    assert size(other, reading_of(other.config.data, format="text")) == whole


def test_the_entry_point_writes_beside_the_run(run_folder, monkeypatch, capsys):
    flags = [f"--workdir={run_folder}", "--perplexity=facts", "--limit=3", "--json"]
    flags += ["--by-frequency"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *flags])
    cli.run(evaluate.main)
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((run_folder / "evaluation" / "perplexity.json").read_text())
    assert printed["step"] == 30 and printed["context"] == CONTEXT
    assert printed["corpora"]["facts"]["documents"] == 3
    assert len(printed["corpora"]["facts"]["by_frequency"]["target"]) == 10
