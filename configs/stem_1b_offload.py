"""The published 1B model with three eighths of its table rows on the devices.

python -m stem_jax.train --config=configs/stem_1b_offload.py --config.data.sources=DIR

For 1 to 16 devices. The hosts together hold all 58.7 GiB of tables with optimizer state, the
devices 22.0 GiB of them.
"""

from configs.stem_1b import get_config as stem_config


def get_config():
    """Differs from stem_1b.py in where rows lie and in the batch, which must leave rows to spare.

    A batch of 2.1 M tokens asks for nearly the whole vocabulary, and then nothing is gained. Three
    batches in flight (two of look-ahead) of 65,536 tokens ask for some 41,000 of 128,256 rows.
    """
    config = stem_config()
    config.tables.resident_rows = 48_128
    config.tables.prefetch = 2
    config.train.global_batch_size = 16
    return config
