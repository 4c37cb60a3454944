"""Rows of some tokens train alone; all others keep their bits, wherever they lie."""

import re

import jax
import numpy as np
import pytest

from stem_jax import run
from stem_jax.errors import InputError
from stem_jax.memory.catalogue import with_trained_tokens
from stem_jax.mesh import make_mesh
from stem_jax.training.resume import changed_keys
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import init_state
from tests.logical import logical_table
from tests.saved_models import BYTES

IDS = (3, 40, 41, 200)
WORDS = {
    "model.vocab_size": 258,
    "model.num_layers": 2,
    "model.stem_layers": (1,),
    "optimizer.train": "tables",
    "tables.weight_decay": 0.0,
}
SOME = WORDS | {"tables.trained_words": IDS}


def _trained(step, make_batch, updates=12):
    state, metrics = init_state(step.blueprint), {}
    before = logical_table(state.tables["stem"])
    for number in range(updates):
        batch = make_batch(step, seed=number)
        state, metrics = step.update(state, batch, make_schedule(step.config, 16))
    return before, logical_table(state.tables["stem"]), state, metrics


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_other_rows_keep_their_bits(train_step, make_batch, shape):
    step = train_step(shape, **SOME)
    before, after, state, metrics = _trained(step, make_batch)
    rows = step.reads.specs["stem"].layout.row_numbers(np.array(IDS))
    moved = np.flatnonzero((before["rows"] != after["rows"]).any(axis=(1, 2)))
    assert set(moved) == set(rows)
    assert set(np.flatnonzero(after["last_step"])) == set(rows)
    assert int(state.touched_rows["stem"]) == len(IDS)
    # The clip norm counts what trains.
    whole = train_step(shape, **WORDS)
    _, _, state, all_metrics = _trained(whole, make_batch)
    assert int(state.touched_rows["stem"]) > len(IDS)
    assert 0 < metrics["table_grad_norm"] < all_metrics["table_grad_norm"]
    if shape == (1, 1, 1):
        return
    alone = _trained(train_step((1, 1, 1), **SOME), make_batch)[1]
    np.testing.assert_allclose(after["rows"], alone["rows"], rtol=0, atol=1e-6)


def test_a_run_continues_with_the_same_words(tiny_config, tmp_path):
    """Words are not known to be others before the text is opened."""
    keys = {**WORDS, "train.seq_len": 8, "data.tokenizer": "bytes", "mesh.data": 1}
    keys |= {"data.sources": "facts", "train.steps": 2, "train.global_batch_size": 1}
    first = tiny_config(**keys, **{"tables.trained_words": "ab"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        run.train(first, tmp_path / "first")
        origin = {"train.continue_from": str(tmp_path / "first"), "train.steps": 3}
        other = tiny_config(**{**keys, **origin, "tables.trained_words": "xy"})
        with pytest.raises(InputError, match=r"tables.trained_words: .* -> \(32, 120, 121\)"):
            run.train(other, tmp_path / "other")
        assert not (tmp_path / "other" / "checkpoints").exists()


def test_words_are_their_tokens(tiny_config):
    config = tiny_config(**WORDS, **{"tables.trained_words": "ab, c"})
    found = with_trained_tokens(config, BYTES)
    assert found.tables.trained_words == tuple(sorted({*BYTES.encode(" ab"), *BYTES.encode(" c")}))
    # A resume compares them once it knows the tokenizer, and then finds another word.
    assert changed_keys(found, config) == []
    other = with_trained_tokens(tiny_config(**WORDS, **{"tables.trained_words": "d"}), BYTES)
    assert changed_keys(found, other) == ["tables.trained_words"]
    assert changed_keys(tiny_config(**WORDS), config) == ["tables.trained_words"]
    with pytest.raises(InputError, match=r"trained_words=\(258,\) must be ids below .*=258"):
        with_trained_tokens(tiny_config(**WORDS, **{"tables.trained_words": (258,)}), BYTES)
    assert with_trained_tokens(tiny_config(**WORDS), BYTES).tables.trained_words is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tables.weight_decay": None}, "optimizer.weight_decay=0.1 decays them; set tables.weig"),
        ({"tables.optimizer": "dense_adamw"}, "dense_adamw moves every row in every step"),
        ({"optimizer.train": "backbone"}, "but no rows train"),
        ({"model.stem_layers": "none"}, "but no rows train"),
        ({"ngram.layers": "1"}, "ngram.layers=(1,) belong to hashes of several"),
        ({"value.layers": "1", "value.weight_decay": 0.2}, "set value.weight_decay=0"),
    ],
)
def test_what_would_move_other_rows_is_refused(tiny_config, keys, message):
    with pytest.raises(InputError, match=re.escape(message)):
        tiny_config(**SOME | keys)
