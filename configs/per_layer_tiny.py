"""tiny.py with per-layer embeddings in place of STEM, behind the FFN of every layer.

python -m stem_jax.train --config=configs/per_layer_tiny.py
"""

from configs.tiny import get_config as tiny_config


def get_config():
    """A sixth of the width of the residual stream for each layer."""
    config = tiny_config()
    config.model.stem_layers = "none"
    config.per_layer.layers = "all"
    config.per_layer.width = 32
    return config
