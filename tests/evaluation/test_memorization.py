"""Seen text against like text that was held out: on a run that knows its text by heart."""

import dataclasses
import json
import random

import numpy as np
import pytest

from stem_jax import evaluate
from stem_jax.checkpoints.loading import load_run
from stem_jax.data.documents import Document
from stem_jax.data.prepare import prepare_stores
from stem_jax.data.token_store import TokenStore
from stem_jax.errors import InputError
from stem_jax.evaluation.like_pieces import draw_pairs
from stem_jax.evaluation.memorization import format_memorization, memorization
from stem_jax.evaluation.scoring import Scorer
from stem_jax.evaluation.training_text import open_training_text
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
    "train.steps": 250,
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
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("letters")
    source = {"data.sources": _store(folder / "store", 0)}
    main(train_flags("tiny", folder / "run", FLAGS | source, {}))
    return folder / "run"


@pytest.fixture(scope="module")
def run(run_folder):
    return load_run(run_folder)


@pytest.fixture(scope="module")
def text(run, run_folder):
    return open_training_text(run, run_folder)


def test_text_that_is_known_by_heart_is_easier(run, text):
    found = memorization(run, text, progress=False)
    assert found["gap"] > 10 * found["standard_error"] > 0
    sides = found["held_out"]["bits_per_byte"], found["seen"]["bits_per_byte"]
    assert found["gap"] == sides[0] - sides[1]
    # Eight letters are three bits.
    assert sides[1] < 2 and sides[0] > 3
    assert found["times"] > 10 and found["pairs"] > 20
    table = format_memorization(found)
    assert [line.split()[0] for line in table.splitlines()[1:4]] == ["held", "seen", "gap"]
    few = memorization(run, text, limit=3, progress=False)
    assert few["pairs"] == 3 and few["seen"]["tokens"] < found["seen"]["tokens"] / 4


def test_text_that_was_never_seen_is_not(run, text, tmp_path):
    """Other text of the same kind takes the place of what was trained on."""
    other = tmp_path / "other"
    _store(other, 1)
    [source] = text.sources
    stores = [TokenStore.open(other / split) for split in ("train", "validation")]
    unseen = dataclasses.replace(source, train=stores[0])
    times = (np.ones(stores[0].num_rows(L, drop_last=True), int),)
    swapped = dataclasses.replace(text, sources=(unseen,), times=times)
    for of in (None, stores[1]):
        found = memorization(run, swapped, held_out=of, progress=False)
        assert abs(found["gap"]) < 3 * found["standard_error"] < 0.6


def test_the_figures_are_those_of_the_pieces(run, text):
    pairs, unpaired = draw_pairs(text)
    found = memorization(run, text, batch_size=3, progress=False)
    assert (found["pairs"], found["unpaired"]) == (len(pairs), unpaired)
    scorer = Scorer(run)
    for side in ("held_out", "seen"):
        pieces = [getattr(pair, side) for pair in pairs]
        scores = [scorer.score([piece.ids.tolist()])[0].log_likelihoods for piece in pieces]
        tokens = sum(map(len, scores))
        assert found[side]["tokens"] == tokens
        assert found[side]["loss"] == pytest.approx(-np.concatenate(scores).mean(), rel=1e-5)
        # Of bytes all ids but eos are text.
        ends = sum(int(piece.ids[-1]) == BYTES.eos_id for piece in pieces)
        assert found[side]["bytes"] == tokens - ends
    assert found["times"] == np.mean([pair.times for pair in pairs])


def test_pairs_are_alike_and_what_was_not_consumed_is_not_seen(text):
    [source], [times_R] = text.sources, text.times
    half = np.where(np.arange(len(times_R)) % 2, times_R, 0)
    pairs, unpaired = draw_pairs(dataclasses.replace(text, times=(half,)))
    again, _ = draw_pairs(dataclasses.replace(text, times=(half,)))
    assert [(p.held_out.start, p.seen.start) for p in pairs] == [
        (p.held_out.start, p.seen.start) for p in again
    ]
    assert len(pairs) > 10 and unpaired > 0
    places = [(p.seen.document, p.seen.start) for p in pairs]
    assert len(set(places)) == len(places)
    for pair in pairs:
        assert pair.held_out.store is source.validation and pair.seen.store is source.train
        row = pair.seen.start // L
        assert row % 2 == 1 and pair.times == times_R[row] > 0
        for of in (
            lambda piece: piece.scored.bit_length(),
            lambda piece: (len(piece.store.document_ids(piece.document)) - 1).bit_length(),
            lambda piece: int(piece.ids[0]) == BYTES.bos_id,
        ):
            assert of(pair.held_out) == of(pair.seen)
    odd, _ = draw_pairs(text, kind_of=lambda store, document: document % 2)
    assert all(pair.held_out.document % 2 == pair.seen.document % 2 for pair in odd)


def test_without_held_out_or_seen_text_there_is_no_gap(run, text):
    [source] = text.sources
    bare = dataclasses.replace(text, sources=(dataclasses.replace(source, validation=None),))
    with pytest.raises(InputError, match="no source of the run has held-out documents; train on"):
        memorization(run, bare, progress=False)
    nothing = dataclasses.replace(text, times=(np.zeros_like(text.times[0]),))
    with pytest.raises(InputError, match="trained on no text that its held-out text is like"):
        memorization(run, nothing, progress=False)
    with pytest.raises(InputError, match="--limit=0 must be at least 1"):
        memorization(run, text, limit=0)


def test_the_entry_point_prints_both_sides(run_folder, capsys):
    evaluate.main([f"--workdir={run_folder}", "--memorization", "--limit=9", "--no-progress"])
    assert "pairs of pieces that are alike" in capsys.readouterr().out
    written = json.loads((run_folder / "evaluation" / "memorization.json").read_text())
    assert written["pairs"] == 9 and written["step"] == 250
    assert {"gap", "held_out", "seen"} < written.keys()
