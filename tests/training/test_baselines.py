"""What a model is compared with at the end of a run, whatever the size of its text."""

import lzma
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from stem_jax.data.loader import ValidationBatches
from stem_jax.data.token_store import TokenStore
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.training import baselines
from stem_jax.training.baselines import token_unigrams, xz

TOKENIZER = load_tokenizer("bytes")
VOCAB = 300
BATCHES = {"seq_len": 16, "global_batch_size": 4}


def store(texts: list[str]) -> TokenStore:
    """In memory."""
    encoded = [text.encode() for text in texts]
    documents = [[TOKENIZER.bos_id, *text, TOKENIZER.eos_id] for text in encoded]
    tokens = np.concatenate([np.array(ids, np.uint16) for ids in documents])
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in documents])])
    sizes = np.array([len(text) for text in encoded])
    meta = SimpleNamespace(
        name="test",
        vocab_size=VOCAB,
        num_tokens=len(tokens),
        num_documents=len(texts),
        num_bytes=int(sizes.sum()),
    )
    return TokenStore(Path("none"), meta, tokens, starts, sizes)


def words(seed: int, number: int) -> list[str]:
    """Documents of 1 to 60 words, an empty one among them."""
    rng = np.random.default_rng(seed)
    vocabulary = ["stem", "table", "of", "rows", "é", "token", "x"]
    texts = [" ".join(rng.choice(vocabulary, rng.integers(1, 60))) for _ in range(number)]
    return [*texts[:3], "", *texts[3:]]


@pytest.fixture
def text():
    return [store(words(seed, 40)) for seed in range(2)], store(words(7, 30))


@pytest.mark.parametrize("max_batches", [None, 5])
@pytest.mark.parametrize("piece", [2**20, 7])
def test_of_a_small_text_they_are_taken_from_all_of_it(text, monkeypatch, max_batches, piece):
    monkeypatch.setattr(baselines, "_PIECE_TOKENS", piece)
    train, validation = text
    held_out = ValidationBatches([validation], max_batches=max_batches, **BATCHES)
    counts = np.ones(VOCAB)
    for part in train:
        counts += np.bincount(part.tokens, minlength=VOCAB)
    log2_p = np.log2(counts / counts.sum())
    documents = list(held_out.document_ids())
    bits = -sum(log2_p[ids[1:]].sum() for ids in documents)
    found = token_unigrams(train, held_out, VOCAB)
    assert found.bits_per_byte == pytest.approx(bits / held_out.num_bytes, rel=1e-12)
    joined = "\n".join(TOKENIZER.decode(ids) for ids in documents).encode()
    packed = xz(held_out, TOKENIZER)
    assert packed.bits_per_byte == 8 * len(lzma.compress(joined, preset=9)) / len(joined)
    assert found.sample == packed.sample == ""


def test_of_a_large_one_a_sample_is_spread_over_it(monkeypatch):
    """Its first half is of one kind, its second half of another."""
    halves = [["ab " * 500] * 40 + ["xyz" * 500] * 40, ["ab " * 300] * 20 + ["xyz" * 300] * 20]
    train = store(halves[0])
    held_out = ValidationBatches([store(halves[1])], **BATCHES)
    whole = token_unigrams([train], held_out, VOCAB)
    monkeypatch.setattr(baselines, "_TOKENS", 12_000)
    monkeypatch.setattr(baselines, "_PIECE_TOKENS", 1000)
    monkeypatch.setattr(baselines, "_XZ_BYTES", 9000)
    monkeypatch.setattr(baselines, "_XZ_TOKENS", 500)
    found = token_unigrams([train], held_out, VOCAB)
    assert found.sample == "12,000 of 120,160 training tokens"
    # Smoothing weighs more in a tenth; one half alone would be off by bits.
    assert found.bits_per_byte == pytest.approx(whole.bits_per_byte, abs=0.05)
    read = []
    decode = type(TOKENIZER).decode
    monkeypatch.setattr(
        type(TOKENIZER), "decode", lambda self, ids: read.append(decode(self, ids)) or read[-1]
    )
    packed = xz(held_out, TOKENIZER)
    text = "\n".join(read)
    assert packed.sample == f"{len(text):,} of 36,000 bytes"
    assert 8500 < len(text) < 9500
    assert abs(text.count("ab ") - text.count("xyz")) < 200
    # No text is read twice, nor the end of a document as its text.
    assert all(len(part) <= 500 for part in read)


def test_memory_does_not_grow_with_the_text():
    """Eight bytes for each token it was, and the text of all documents."""
    train = store(["a" * 2**20] * 8)
    held_out = ValidationBatches([store(["b" * 2**12] * 64)], seq_len=256, global_batch_size=64)
    tracemalloc.start()
    try:
        token_unigrams([train], held_out, VOCAB)
        assert tracemalloc.get_traced_memory()[1] < 24 * 2**20 < 4 * train.num_tokens
    finally:
        tracemalloc.stop()
