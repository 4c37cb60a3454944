"""Hashed 2- and 3-grams added to values where `value` adds tokens, as large as STEM half."""

import math


def vary(config):
    """Differs from `value` in its keys, and from `ngram` in its reader; rates are the latter's."""
    model, ngram = config.model, config.ngram
    S = model.num_layers // 2
    head_dim = model.head_dim or model.embed_dim // model.num_heads
    ngram.layers = "half"
    ngram.reader = "value"
    ngram.max_order = 3
    ngram.heads = 4
    ngram.width = model.num_kv_heads * head_dim
    # Each of S layers has as many numbers as STEM half's are more than a dense layer's.
    keys = (model.vocab_size - model.embed_dim) * model.ffn_dim // ngram.width
    # Heads have the next primes, the k-th of which is about k ln(keys) more.
    ngram.keys_per_head = keys - round(4 * S * math.log(keys))
    ngram.lr_multiplier = 5.0
    ngram.weight_decay = 0.0
