"""The published 1B model with a quarter of its table rows on the devices, the rest on the hosts.

python -m stem_jax.train --config=configs/stem_1b_offload.py --config.data.sources=DIR

Of 58.7 GiB of tables with optimizer state 44 GiB stay in host memory, over all hosts together.
"""

from configs.stem_1b import get_config as stem_config


def get_config():
    """Differs from stem_1b.py in where rows lie and in the batch, which must leave rows to spare.

    A batch of 2.1 M tokens asks for most of the vocabulary, and then nothing is gained. With
    131,072 tokens a step and two batches of look-ahead some 30,000 rows are in flight.
    """
    config = stem_config()
    config.tables.resident_rows = 128512 // 4
    config.tables.prefetch = 2
    config.train.global_batch_size = 32
    return config
