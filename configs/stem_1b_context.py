"""The context stage of stem_1b_midtrain.py: 20 B tokens more, in sequences of 32,768.

python -m stem_jax.train --config=configs/stem_1b_context.py --workdir=runs/stem_1b_context

Tokens, length and text, ProLong-data-64k with attention within documents, are as published (arXiv
2601.10639). YaRN, rates and batch are ours.
"""

from configs.stem_1b_midtrain import get_config as midtrain_config

TOKENS = 20e9


def get_config():
    """Goes on from runs/stem_1b_midtrain; as many tokens a step as before, 64 sequences."""
    config = midtrain_config()
    step_tokens = config.train.global_batch_size * config.train.seq_len
    config.train.continue_from = "runs/stem_1b_midtrain"
    config.train.steps += round(TOKENS / step_tokens)
    config.data.sources = "stores/prolong_64k"
    config.model.rope_scaling = "yarn"
    config.model.rope_factor = 8.0
    config.model.rope_original_len = config.train.seq_len
    config.train.seq_len = 32768
    config.train.global_batch_size = step_tokens // config.train.seq_len
    return config
