"""Scores of token sequences: those of the whole forward, in any batch, wherever rows lie."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.checkpoints.loading import load_run
from stem_jax.errors import InputError
from stem_jax.evaluation import scoring
from stem_jax.evaluation.scoring import Scorer
from tests.saved_models import CONTEXT, logits, run_folders

pytestmark = pytest.mark.little_effort

MODELS = {"stem": {}, "dense": {"model.stem_layers": "none"}, "scanned": {"model.num_layers": 5}}
MODELS["scanned"] |= {"model.stem_layers": (1, 3), "model.scan_layers": True}


@pytest.fixture(scope="module")
def run_folder(train_step, make_batch, tmp_path_factory):
    """run_folder(name): the work folder of a trained model."""
    return run_folders(MODELS, train_step, make_batch, tmp_path_factory)


@pytest.fixture(scope="module")
def sequences():
    """Ids of lengths in three buckets, each followed as in training or at random."""
    rng = np.random.default_rng(0)
    made = []
    for length in (2, 9, 17, 18, 40, 60, CONTEXT + 1):
        ids = [int(rng.integers(256))]
        for _ in range(length - 1):
            group, place = divmod(ids[-1], 16)
            follows = rng.random() < 0.8
            ids.append(16 * group + (5 * place + 3) % 16 if follows else int(rng.integers(256)))
        made.append(ids)
    return made


def _expected(run, ids):
    """Log-likelihoods and whether greedy, from the logits of one sequence without padding."""
    logits_LxV = np.float64(logits(run, np.asarray([ids[:-1]]))[0])
    log_p_LxV = logits_LxV - np.log(np.sum(np.exp(logits_LxV), axis=-1, keepdims=True))
    targets_L = np.asarray(ids[1:])
    picked_L = np.take_along_axis(log_p_LxV, targets_L[:, None], axis=1)[:, 0]
    return picked_L, np.argmax(log_p_LxV, axis=1) == targets_L


@pytest.mark.parametrize("name", ["stem", "dense", pytest.param("scanned", marks=pytest.mark.long)])
def test_scores_are_those_of_the_whole_forward(name, run_folder, sequences):
    run = load_run(run_folder(name))
    if name != "stem":
        # One length of each bucket.
        sequences = sequences[::3]
    seen = 0
    for ids, scores in zip(sequences, Scorer(run, 4).score(sequences), strict=True):
        likelihoods_L, greedy_L = _expected(run, ids)
        assert scores.log_likelihoods.shape == (len(ids) - 1,)
        np.testing.assert_allclose(scores.log_likelihoods, likelihoods_L, atol=2e-5, rtol=0)
        np.testing.assert_array_equal(scores.greedy, greedy_L)
        seen += scores.greedy.sum()
    # The model has learned something, but not everything.
    assert 0.1 < seen / sum(len(ids) - 1 for ids in sequences) < 0.95


def test_batch_and_chunk_do_not_matter(run_folder, sequences, monkeypatch):
    run = load_run(run_folder("stem"))
    whole = Scorer(run, 7).score(sequences)
    # Three positions of two sequences at a time.
    monkeypatch.setattr(scoring, "_LOGITS_BYTES", 3 * 4 * 2 * 258)
    for scores, other in zip(whole, Scorer(run, 2).score(sequences), strict=True):
        np.testing.assert_allclose(scores.log_likelihoods, other.log_likelihoods, atol=2e-5)
        np.testing.assert_array_equal(scores.greedy, other.greedy)


def test_rows_in_host_memory_give_the_same(run_folder, sequences):
    resident = Scorer(load_run(run_folder("stem")), 1).score(sequences)
    run = load_run(run_folder("stem"), resident_rows=104)
    offloaded = Scorer(run, 1).score(sequences)
    for scores, other in zip(resident, offloaded, strict=True):
        np.testing.assert_allclose(scores.log_likelihoods, other.log_likelihoods, atol=1e-6)
    with pytest.raises(InputError, match=r"distinct tokens.*--resident-rows="):
        few = dataclasses.replace(run, rows=load_run(run_folder("stem"), resident_rows=32).rows)
        try:
            Scorer(few, 7).score(sequences)
        finally:
            few.close()
    run.close()


def test_few_programs_and_one_product_of_the_head(run_folder, sequences):
    scorer = Scorer(load_run(run_folder("dense")), 4)
    done = []
    scorer.score(sequences, done.append)
    scorer.score(sequences[3:], done.append)
    assert done == [4, 3, 4]
    # Batches as long as their longest: 128, 32 and, after that, 128 once more.
    assert scorer.program._cache_size() == 2
    shape = jax.ShapeDtypeStruct((4, 32), jnp.int32)
    lengths = jax.ShapeDtypeStruct((4,), jnp.int32)
    run = scorer._run
    compiled = scorer.program.lower(run.params, run.rows, shape, shape, lengths, shape).compile()
    # The likeliest token and the loss share one: of 4 x 32 positions and 258 logits.
    products = [
        line for line in compiled.as_text().splitlines() if " dot(" in line or "matmul" in line
    ]
    assert sum("258" in line.split("=")[1].split("(")[0] for line in products) == 1


def test_refused_sequences_name_value_and_remedy(run_folder):
    run = load_run(run_folder("dense"))
    with pytest.raises(InputError, match=r"sequence 2 has 1 ids.*seq_len=128.*2 to 129"):
        Scorer(run).score([[1, 2], [1]])
    with pytest.raises(InputError, match="sequence 1 has 130 ids"):
        Scorer(run).score([[1] * 130])
    with pytest.raises(InputError, match=r"ids from 3 to 258.*0 to 257"):
        Scorer(run).score([[3, 258]])
    with pytest.raises(InputError, match="--batch-size=0 must be at least 1"):
        Scorer(run, 0)
    assert Scorer(run).score([]) == []
