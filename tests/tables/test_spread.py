"""Real text asks every shard for about as much."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from stem_jax.data.corpora import read_corpus
from stem_jax.data.sentencepiece_training import train_sentencepiece
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.tables.sharded_table import ShardedTable

VOCAB, OWNERS, TOKENS_PER_DEVICE = 4096, 8, 8192


def test_busiest_owner_on_real_text(tmp_path, train_step):
    """The exchange's own count of what is asked, which is the metric `table/busiest_owner`."""
    texts = list(itertools.islice(read_corpus("stdlib"), 60))
    train_sentencepiece(texts, tmp_path / "tokenizer.model", VOCAB)
    tokenizer = load_tokenizer("sentencepiece", tmp_path / "tokenizer.model")
    ids = np.concatenate([tokenizer.encode(text) for text in texts]).astype(np.int32)
    step = train_step((OWNERS, 1, 1), **{"model.vocab_size": VOCAB, "tables.pad_multiple": 256})
    table = ShardedTable(step.reads.specs["stem"], step.mesh, TOKENS_PER_DEVICE)
    count = jax.jit(lambda keys: table.request(keys, jnp.ones_like(keys, bool)).asked)
    batches = ids[: len(ids) // (OWNERS * TOKENS_PER_DEVICE) * OWNERS * TOKENS_PER_DEVICE]
    batches = batches.reshape(-1, 1, OWNERS, TOKENS_PER_DEVICE)
    assert len(batches) >= 3
    for batch in batches:
        asked_P = np.asarray(count(jax.device_put(batch, step.batch_sharding)))
        assert asked_P.max() / asked_P.mean() <= 1.2
        # In the order of frequency the first shard would be asked for far more.
        contiguous_P = sum(
            np.bincount(np.unique(device) // (VOCAB // OWNERS), minlength=OWNERS)
            for device in batch[0]
        )
        assert contiguous_P.max() / contiguous_P.mean() > 1.4
        assert contiguous_P.sum() == asked_P.sum()
