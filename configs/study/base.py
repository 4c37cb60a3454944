"""The dense model that a study's variants change, at its core size.

python -m stem_jax.train --config=configs/study/base.py --config.data.sources=TEXT/store
"""

from configs.base import get_config as base_config

TOKENS = 4_000_000


def get_config():
    """0.47 M parameters, 4 M tokens: 8 of them for each parameter."""
    config = base_config()
    config.model.vocab_size = 2048
    config.model.embed_dim = 64
    config.model.num_layers = 4
    config.model.num_heads = 2
    config.model.num_kv_heads = 2
    config.model.ffn_dim = 192
    config.model.stem_layers = "none"
    config.optimizer.learning_rate = 3e-3
    config.train.init = "name"
    config.train.global_batch_size = 16
    config.train.seq_len = 256
    config.train.steps = TOKENS // (16 * 256)
    config.optimizer.warmup_steps = config.train.steps // 20
    config.train.log_every = 1  # spikes are counted among all losses
    config.train.sample_prompt = ""
    config.eval.baselines = False
    config.eval.every = config.train.steps // 8
    config.checkpoint.every = config.train.steps // 4
    config.checkpoint.keep = 1
    return config
