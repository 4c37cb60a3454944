"""tiny.py with half of its table rows in host memory: 2,048 of 4,096 are on the device.

python -m stem_jax.train --config=configs/tiny_offload.py

Losses and parameters are those of tiny.py, bit for bit on CPUs.
"""

from configs.tiny import get_config as tiny_config


def get_config():
    """Differs from tiny.py in where rows lie alone."""
    config = tiny_config()
    config.tables.resident_rows = 2048
    config.tables.prefetch = 2
    return config
