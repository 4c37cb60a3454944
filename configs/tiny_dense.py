"""The dense twin of tiny.py: the same model with an up projection in every layer.

python -m stem_jax.train --config=configs/tiny_dense.py
"""

from configs.tiny import get_config as tiny_config


def get_config():
    """Differs from tiny.py in stem_layers alone."""
    config = tiny_config()
    config.model.stem_layers = "none"
    return config
