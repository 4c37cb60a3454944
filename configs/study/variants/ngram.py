"""Hashed 2- and 3-grams before attention of the second layer (Engram), as large as STEM half."""

import math


def vary(config):
    """Rows of a token are D wide together; so many keys that total parameters are STEM half's.

    One layer has the whole table: the second, whose residual stream has seen more than the token
    and whose successors, most of the layers, read what it adds.
    """
    model, ngram = config.model, config.ngram
    V, D, S = model.vocab_size, model.embed_dim, model.num_layers // 2
    ngram.layers = "1"
    ngram.max_order = 3
    ngram.heads = 4
    ngram.width = D
    # The reader's two matrices [D, D] have as many numbers as 2 D keys.
    keys = S * (V - D) * model.ffn_dim // D - 2 * D
    # Heads have the next primes, the k-th of which is about k ln(keys) more.
    ngram.keys_per_head = keys - round(4 * math.log(keys))
    # As published: five times the rate, and no decay.
    ngram.lr_multiplier = 5.0
    ngram.weight_decay = 0.0
