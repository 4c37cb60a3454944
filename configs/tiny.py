"""A small STEM model on the documentation that every Python carries; minutes on two CPU cores.

python -m stem_jax.train --config=configs/tiny.py
"""

from configs.base import get_config as base_config


def get_config():
    """A third of the six layers (1 and 4) take their up values from tables."""
    config = base_config()
    config.model.vocab_size = 4096
    config.model.embed_dim = 192
    config.model.num_layers = 6
    config.model.num_heads = 6
    config.model.num_kv_heads = 2
    config.model.ffn_dim = 512
    config.model.stem_layers = "third"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 20
    config.train.steps = 200
    config.train.global_batch_size = 8
    config.train.seq_len = 256
    config.train.log_every = 1
    config.eval.every = 50
    config.checkpoint.every = 50
    return config
