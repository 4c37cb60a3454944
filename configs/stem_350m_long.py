"""A context-extension stage: stem_350m.py, trained on 2,048 tokens, goes on with 32,768.

python -m stem_jax.train --config=configs/stem_350m_long.py --config.data.sources=DIR

Begins with the newest checkpoint of runs/stem_350m; give another with --config.train.init_from=DIR.
The length is that of the published long-context stage (arXiv 2601.10639); YaRN is our choice. A
micro-batch is 16 sequences, so 16 devices at most share a batch.
"""

from configs.stem_350m import get_config as stem_350m_config


def get_config():
    """YaRN by a factor of 16, a tenth of the learning rate, as many tokens a step as before."""
    config = stem_350m_config()
    config.model.rope_scaling = "yarn"
    config.model.rope_factor = 16.0
    config.model.rope_original_len = 2048
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 100
    config.train.init_from = "runs/stem_350m"
    config.train.steps = 2000
    config.train.global_batch_size = 32
    config.train.micro_batches = 2
    config.train.seq_len = 32768
    config.eval.every = 500
    config.checkpoint.every = 500
    return config
