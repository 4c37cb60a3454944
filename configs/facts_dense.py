"""The dense twin of facts.py.

python -m stem_jax.train --config=configs/facts_dense.py
"""

from configs.facts import get_config as facts_config


def get_config():
    """Every layer projects."""
    config = facts_config()
    config.model.stem_layers = "none"
    return config
