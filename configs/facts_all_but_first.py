"""facts.py with a dense first layer, as published models have it, made editable all the same.

python -m stem_jax.train --config=configs/facts_all_but_first.py
"""

from configs.facts import get_config as facts_config


def get_config():
    """Without the dropout the dense layer learns what a token is from its embedding."""
    config = facts_config()
    config.model.stem_layers = "all_but_first"
    config.model.token_embedding_dropout = 0.3
    return config
