"""Real text asks every shard for about as much."""

import itertools

import numpy as np

from stem_jax.data.corpora import read_corpus
from stem_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from stem_jax.tables.layout import TableLayout

VOCAB, OWNERS, TOKENS_PER_DEVICE = 4096, 8, 8192


def test_busiest_owner_on_real_text(tmp_path):
    texts = list(itertools.islice(read_corpus("stdlib"), 60))
    train_sentencepiece(texts, tmp_path / "tokenizer.model", VOCAB)
    tokenizer = load_tokenizer("sentencepiece", tmp_path / "tokenizer.model")
    ids = np.concatenate([tokenizer.encode(text) for text in texts])
    layout = TableLayout(VOCAB, 256)

    def busiest_over_mean(owner_of) -> list[float]:
        size = OWNERS * TOKENS_PER_DEVICE
        ratios = []
        for start in range(0, len(ids) - size, size):
            asked = np.zeros(OWNERS)
            for device in ids[start : start + size].reshape(OWNERS, -1):
                asked += np.bincount(owner_of(np.unique(device)), minlength=OWNERS)
            ratios.append(asked.max() / asked.mean())
        return ratios

    shard = layout.num_rows // OWNERS
    spread = busiest_over_mean(lambda keys: layout.row_numbers(keys) // shard)
    assert len(spread) >= 3
    assert max(spread) <= 1.2
    # In the order of frequency the first shard would be asked for far more.
    assert min(busiest_over_mean(lambda keys: keys // shard)) > 1.4
