"""The dense twin of stem_1b.py.

python -m stem_jax.train --config=configs/dense_1b.py --config.data.sources=DIR
"""

from configs.stem_1b import get_config as stem_config


def get_config():
    """Differs from stem_1b.py in stem_layers alone."""
    config = stem_config()
    config.model.stem_layers = "none"
    return config
