"""Seen text against like text that was held out; also on a run that knows its text by heart."""

import dataclasses
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest

from stem_jax import evaluate
from stem_jax.checkpoints.loading import load_run
from stem_jax.data.documents import Document
from stem_jax.data.prepare import open_stores, prepare_stores
from stem_jax.data.sources import OpenedSource
from stem_jax.errors import InputError
from stem_jax.evaluation.like_pieces import draw_pairs
from stem_jax.evaluation.memorization import format_memorization, memorization
from stem_jax.evaluation.scoring import Scores
from stem_jax.evaluation.training_text import TrainingText, open_training_text
from stem_jax.train import main
from tests.children import train_flags
from tests.saved_models import BYTES

L = 32
FLAGS = {
    "data.tokenizer": "bytes",
    "model.vocab_size": 258,
    "model.embed_dim": 64,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.ffn_dim": 96,
    "model.stem_layers": "1",
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup_steps": 5,
    "train.seq_len": L,
    "train.steps": 350,
    "train.global_batch_size": 8,
    "train.sample_prompt": "",
    "eval.every": 0,
    "eval.baselines": False,
    "checkpoint.every": 0,
}


def _store(folder, seed, count=60):
    """Documents of random letters, of which nothing but the letters can be learned."""
    rng = random.Random(seed)
    lengths = (rng.randrange(3, 90) for _ in range(count))
    texts = ("".join(rng.choices("abcdefgh", k=n)) for n in lengths)
    documents = [Document(text, str(i)) for i, text in enumerate(texts)]
    options = {"validation_fraction": 0.4, "seed": 0, "progress": False}
    prepare_stores(documents, BYTES, folder, name="letters", **options)
    return str(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Every third row was never read, every third one twice."""
    stores = open_stores(_store(tmp_path_factory.mktemp("text") / "store", 0), BYTES)
    return _read(stores["train"], stores["validation"], lambda row: row % 3)


def _read(train, held_out, times_of):
    times_R = np.array([times_of(row) for row in range(train.num_rows(L, drop_last=True))])
    return TrainingText((OpenedSource("letters", 1.0, train, held_out),), (times_R,), L, 258)


class _Scorer:
    """Says of an id a number of nats that depends on it alone."""

    context = L

    def score(self, sequences, on_scored):
        on_scored(len(sequences))
        of_all = (np.asarray(ids[1:], np.float32) % 7 / 2 for ids in sequences)
        return [Scores(-nats, nats > 0) for nats in of_all]


@pytest.fixture
def scored(monkeypatch):
    """The run that a `_Scorer` speaks for."""
    monkeypatch.setattr("stem_jax.evaluation.memorization.Scorer", lambda *_: _Scorer())
    return SimpleNamespace(tokenizer=BYTES)


def test_the_figures_are_those_of_the_pieces(scored, text):
    pairs, unpaired = draw_pairs(text)
    found = memorization(scored, text, progress=False)
    assert (found["pairs"], found["unpaired"], found["context"]) == (len(pairs), unpaired, L)
    for side in ("held_out", "seen"):
        targets = np.concatenate([getattr(pair, side).ids[1:] for pair in pairs])
        assert found[side]["tokens"] == len(targets)
        assert found[side]["loss"] == pytest.approx((targets % 7 / 2).mean())
        # Of bytes all ids but eos are text.
        assert found[side]["bytes"] == (targets != BYTES.eos_id).sum()
    assert found["gap"] == found["held_out"]["bits_per_byte"] - found["seen"]["bits_per_byte"] != 0
    assert found["times"] == np.mean([pair.times for pair in pairs]) > 1
    lines = format_memorization(found).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["held", "seen", "gap"]
    few = memorization(scored, text, limit=3, progress=False)
    assert few["pairs"] == 3 and few["seen"]["tokens"] < found["seen"]["tokens"] / 4


def test_the_standard_error_is_the_spread_of_gaps_between_other_documents(scored, tmp_path):
    """So many texts are drawn that their spread is known to a sixth."""
    gaps, errors = [], []
    for seed in range(20):
        stores = open_stores(_store(tmp_path / str(seed), seed, count=40), BYTES)
        text = _read(stores["train"], stores["validation"], lambda _: 1)
        found = memorization(scored, text, progress=False)
        gaps.append(found["gap"])
        errors.append(found["standard_error"])
    assert np.mean(errors) == pytest.approx(np.std(gaps, ddof=1), rel=0.4)
    one = memorization(scored, text, limit=1, progress=False)
    assert one["standard_error"] is None and "+- -" in format_memorization(one)


def test_pairs_are_alike_and_what_was_not_consumed_is_not_seen(text):
    [source], [times_R] = text.sources, text.times
    pairs, unpaired = draw_pairs(text)
    again, _ = draw_pairs(text)
    assert [(p.held_out.start, p.seen.start) for p in pairs] == [
        (p.held_out.start, p.seen.start) for p in again
    ]
    assert len(pairs) > 10 and unpaired > 0
    places = [(p.seen.document, p.seen.start) for p in pairs]
    assert len(set(places)) == len(places)
    for pair in pairs:
        assert pair.held_out.store is source.validation and pair.seen.store is source.train
        assert pair.times == times_R[pair.seen.start // L] > 0
        for of in (
            lambda piece: piece.scored.bit_length(),
            lambda piece: (len(piece.store.document_ids(piece.document)) - 1).bit_length(),
            lambda piece: int(piece.ids[0]) == BYTES.bos_id,
        ):
            assert of(pair.held_out) == of(pair.seen)
    odd, _ = draw_pairs(text, kind_of=lambda store, document: document % 2)
    assert all(pair.held_out.document % 2 == pair.seen.document % 2 for pair in odd)


def test_sources_are_compared_with_themselves(text, tmp_path):
    [source], [times_R] = text.sources, text.times
    stores = open_stores(_store(tmp_path / "other", 1), BYTES)
    other = OpenedSource("other", 1.0, stores["train"], stores["validation"])
    times = np.ones(stores["train"].num_rows(L, drop_last=True), int)
    both = dataclasses.replace(text, sources=(source, other), times=(times_R, times))
    pairs, _ = draw_pairs(both)
    folders = {(p.held_out.store.folder.parent, p.seen.store.folder.parent) for p in pairs}
    one, two = source.train.folder.parent, other.train.folder.parent
    assert folders == {(one, one), (two, two)}
    mixed, _ = draw_pairs(both, held_out=other.validation)
    assert {p.held_out.store.folder.parent for p in mixed} == {two}
    assert {p.seen.store.folder.parent for p in mixed} == {one, two}


def test_without_held_out_or_seen_text_there_is_no_gap(scored, text):
    [source] = text.sources
    bare = dataclasses.replace(text, sources=(dataclasses.replace(source, validation=None),))
    with pytest.raises(InputError, match="no source of the run has held-out documents; train on"):
        memorization(scored, bare, progress=False)
    nothing = dataclasses.replace(text, times=(np.zeros_like(text.times[0]),))
    with pytest.raises(InputError, match="trained on no text that its held-out text is like"):
        memorization(scored, nothing, progress=False)
    with pytest.raises(InputError, match="--limit=0 must be at least 1"):
        memorization(scored, text, limit=0)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("letters")
    source = {"data.sources": _store(folder / "store", 0)}
    main(train_flags("tiny", folder / "run", FLAGS | source, {}))
    return folder / "run"


@pytest.mark.long
@pytest.mark.little_effort
def test_text_that_is_known_by_heart_is_easier(run_folder, tmp_path):
    run = load_run(run_folder)
    known = open_training_text(run, run_folder)
    found = memorization(run, known, progress=False)
    assert found["gap"] > 10 * found["standard_error"] > 0
    # Eight letters are three bits.
    assert found["seen"]["bits_per_byte"] < 2 and found["held_out"]["bits_per_byte"] > 3
    assert found["times"] > 10 and found["pairs"] > 20
    # Other text of the same kind takes the place of what was trained on.
    stores = open_stores(_store(tmp_path / "other", 1), BYTES)
    [source] = known.sources
    unseen = _read(stores["train"], source.validation, lambda _: 1)
    for held_out in (None, stores["validation"]):
        found = memorization(run, unseen, held_out=held_out, progress=False)
        assert abs(found["gap"]) < 3 * found["standard_error"] < 0.6


@pytest.mark.long
@pytest.mark.little_effort
def test_the_entry_point_prints_both_sides(run_folder, capsys):
    evaluate.main([f"--workdir={run_folder}", "--memorization", "--limit=9", "--no-progress"])
    assert "pairs of pieces that are alike" in capsys.readouterr().out
    written = json.loads((run_folder / "evaluation" / "memorization.json").read_text())
    assert written["pairs"] == 9 and written["step"] == FLAGS["train.steps"]
    assert {"gap", "held_out", "seen"} < written.keys()
