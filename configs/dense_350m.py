"""The dense twin of stem_350m.py.

python -m stem_jax.train --config=configs/dense_350m.py --config.data.sources=DIR
"""

from configs.stem_350m import get_config as stem_config


def get_config():
    """Differs from stem_350m.py in stem_layers alone."""
    config = stem_config()
    config.model.stem_layers = "none"
    return config
