"""The first stage of needle.py.

python -m stem_jax.train --config=configs/needle_pairs.py
"""

from configs.needle import get_config as needle_config


def get_config():
    """Short documents of two names; some haystacks, for the tokenizer to know their words."""
    config = needle_config()
    config.data.sources = "name_pairs=0.97,needles=0.03"
    config.optimizer.schedule = "constant"
    config.train.init_from = None
    config.train.steps = 900
    return config
