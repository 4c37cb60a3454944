r"""The dense model that a study's variants change, at its core size.

GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m stem_jax.train --config=configs/study/base.py \
    --config.data.sources=TEXT/store

Without these huge pages a CPU needs 1.7 times the time: it gives memory back and takes it again in
each step.
"""

import math

from configs.base import get_config as base_config

TOKENS = 4_000_000


def get_config():
    """0.48 M parameters, of which 0.34 M multiply; 4 M tokens, 8 for each parameter."""
    config = base_config()
    config.model.vocab_size = 2048
    config.model.embed_dim = 64
    config.model.num_layers = 4
    config.model.num_heads = 2
    config.model.num_kv_heads = 2
    config.model.ffn_dim = 192
    config.model.stem_layers = "none"
    config.optimizer.learning_rate = 9e-3  # better than 1e-3 and 3e-3 for each
    config.train.init = "name"
    # 8, 16 and 32 take the same time for a token; fewer at a time learn more from as many tokens.
    config.train.global_batch_size = 8
    config.train.seq_len = 256
    config.train.steps = TOKENS // (8 * 256)
    config.optimizer.warmup_steps = config.train.steps // 20
    config.train.log_every = 1  # spikes are counted among all losses
    config.train.sample_prompt = ""
    config.eval.baselines = False
    config.eval.max_batches = 64  # 131,072 tokens
    config.eval.every = math.ceil(config.train.steps / 8)
    config.checkpoint.every = math.ceil(config.train.steps / 4)
    config.checkpoint.keep = 1
    return config
