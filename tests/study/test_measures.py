"""What is measured of a run of a study, against what evaluate says of the same run."""

import dataclasses
import json
import math
import random

import pytest

from stem_jax.checkpoints.loading import load_run
from stem_jax.data.documents import Document
from stem_jax.data.prepare import prepare_stores
from stem_jax.data.sentencepiece_training import train_sentencepiece
from stem_jax.data.token_store import TokenStore
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.evaluation.memorization import memorization
from stem_jax.evaluation.perplexity import perplexity
from stem_jax.evaluation.recall import recall
from stem_jax.evaluation.training_text import open_training_text
from stem_jax.study import measures
from stem_jax.study.measured import is_known
from stem_jax.study.measures import measure_run
from stem_jax.study.prepared_text import PreparedText
from stem_jax.train import main
from tests.children import train_flags

FLAGS = {
    "model.vocab_size": 300,
    "model.embed_dim": 32,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.ffn_dim": 48,
    "model.stem_layers": "1",
    "optimizer.warmup_steps": 5,
    "train.seq_len": 96,
    "train.steps": 20,
    "train.global_batch_size": 8,
    "train.sample_prompt": "",
    "eval.every": 10,
    "eval.baselines": False,
    "checkpoint.every": 0,
}


def _texts(seed, count):
    rng = random.Random(seed)
    words = [f"{a}{b}{c}" for a in "bdkl" for b in "aeiou" for c in "mnrt"]
    return [" ".join(rng.choices(words, k=rng.randrange(5, 120))) for _ in range(count)]


def _documents(texts):
    return [Document(text, str(number)) for number, text in enumerate(texts)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text in its folder: documents of two kinds by their names."""
    folder = tmp_path_factory.mktemp("text")
    train_sentencepiece(iter(_texts(0, 200)), folder / "tokenizer.model", 300)
    tokenizer = load_tokenizer("sentencepiece", folder / "tokenizer.model")
    options = {"name": "words", "seed": 0, "progress": False}
    stores = prepare_stores(
        _documents(_texts(0, 200)), tokenizer, folder / "store", validation_fraction=0.1, **options
    )
    tokenizer.save(folder / "store" / "tokenizer")
    test = _documents(_texts(1, 30))
    test = prepare_stores(test, tokenizer, folder / "test", validation_fraction=0, **options)
    listed = {
        split: [
            {"package": "p", "path": f"a/{number}.{'rst' if number % 3 else 'MD'}"}
            for number in range(store.num_documents)
        ]
        for split, store in (("train", stores["train"]), ("test", test["train"]))
    }
    (folder / "documents.json").write_text(json.dumps(listed))
    where = folder / "store", folder / "test", folder / "documents.json"
    return PreparedText("words", *where, "checksum")


@pytest.fixture(scope="module")
def workdir(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured") / "run"
    source = {"data.sources": str(text.store), "train.log_every": 1}
    main(train_flags("tiny", folder, FLAGS | source, {}))
    return folder


def test_kinds_are_what_the_files_are_called(text):
    kind_of = measures._kinds(text)
    train, test = (TokenStore.open(folder / "train") for folder in (text.store, text.test))
    assert [kind_of(store, 3) for store in (train, test)] == [".md"] * 2
    assert [kind_of(store, 4) for store in (train, test)] == [".rst"] * 2


@pytest.mark.long
@pytest.mark.little_effort
def test_a_run_has_the_measures_that_evaluate_gives(workdir, text):
    found = measure_run(workdir, text)
    assert json.dumps(measure_run(workdir, text)) == json.dumps(found)
    of_run, documents = found["measures"], found["documents"]
    assert all(map(is_known, of_run)) and all(map(math.isfinite, of_run.values()))
    run, source = load_run(workdir), str(text.test)
    seen = open_training_text(run, workdir)
    options = {"batch_size": measures._BATCH, "progress": False}
    record = perplexity(run, [source], counts=seen.pair_counts(), **options)["corpora"][source]
    assert of_run["test_bits_per_byte"] == record["bits_per_byte"]
    for side in ("input", "target"):
        groups = record["by_frequency"][side]
        for number, group in enumerate(groups):
            assert of_run[f"{side}_frequency_{number}"] == group["bits_per_byte"]
    whole = math.fsum(documents["nats"]) / math.log(2) / sum(documents["bytes"])
    assert whole == pytest.approx(record["bits_per_byte"], rel=1e-12)
    test = TokenStore.open(text.test / "train")
    assert documents["bytes"] == test.document_bytes.tolist()
    gap = memorization(run, seen, held_out=test, kind_of=measures._kinds(text), **options)
    assert of_run["memorization_gap"] == gap["gap"]
    assert of_run["memorization_seen"] == gap["seen"]["bits_per_byte"]
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    validations = [r["eval/bits_per_byte"] for r in lines if "eval/bits_per_byte" in r]
    assert found["curve"]["dev_bits_per_byte"] == validations
    assert of_run["dev_bits_per_byte"] == validations[-1]
    assert len(found["curve"]["loss"]) == 20 and found["curve"]["tokens"][-1] == 20 * 8 * 96
    assert {"spikes", "gradient_norm_spread"} < of_run.keys()


@pytest.mark.long
@pytest.mark.little_effort
def test_a_text_without_test_documents_asks_for_facts(workdir, text, monkeypatch):
    monkeypatch.setattr(measures, "recall", lambda *_, **options: recall(*_, limit=8, **options))
    facts = dataclasses.replace(text, test=None)
    found = measure_run(workdir, facts)
    assert found == measure_run(workdir, None)
    assert found["documents"] == {"nats": [], "bytes": []}
    # No name is one token to this tokenizer.
    assert found["measures"]["facts_told_several_tokens"] == 0.0
    assert "facts_untold_several_tokens" in found["measures"]
    assert "facts_told_one_token" not in found["measures"]
    assert "test_bits_per_byte" not in found["measures"]


def test_shares_of_facts_are_called_by_phrasing_and_name(monkeypatch):
    names = {
        "one_token": {"trained": 0.75, "held_out": 0.5},
        "several_tokens": {"trained": 0.25, "held_out": None},
    }
    monkeypatch.setattr(measures, "recall", lambda *_, **__: {"names": names})
    assert measures._facts(None) == {
        "facts_told_one_token": 0.75,
        "facts_untold_one_token": 0.5,
        "facts_told_several_tokens": 0.25,
    }
