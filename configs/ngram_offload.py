"""ngram_tiny.py with a tenth of its rows on the device, the others in host memory.

python -m stem_jax.train --config=configs/ngram_offload.py

Losses and parameters are those of ngram_tiny.py, bit for bit on CPUs.
"""

from configs.ngram_tiny import get_config as ngram_config


def get_config():
    """Differs from ngram_tiny.py in where rows lie alone."""
    config = ngram_config()
    config.ngram.resident_rows = 40192
    config.tables.prefetch = 2
    return config
