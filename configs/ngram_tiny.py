"""tiny.py with hashed 2- and 3-grams in place of STEM (Engram), read before attention of layer 1.

python -m stem_jax.train --config=configs/ngram_tiny.py
"""

from configs.tiny import get_config as tiny_config


def get_config():
    """Four hashes of each order, 50,000 rows of 24 numbers for each hash: 9.6 M parameters."""
    config = tiny_config()
    config.model.stem_layers = "none"
    config.ngram.layers = "1"
    config.ngram.max_order = 3
    config.ngram.heads = 4
    config.ngram.keys_per_head = 50000
    config.ngram.width = 192
    # As published: five times the rate, and no decay.
    config.ngram.lr_multiplier = 5.0
    config.ngram.weight_decay = 0.0
    return config
