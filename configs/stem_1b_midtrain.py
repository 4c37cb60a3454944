"""Mid-training of stem_1b.py: 100 B tokens more, of text, mathematics and code.

python -m stem_jax.train --config=configs/stem_1b_midtrain.py --workdir=runs/stem_1b_midtrain

Tokens and mixture are as published (arXiv 2601.10639): 65% OLMo-Mix-1124, 5% Nemotron-CC-Math, 30%
Nemotron-Pretraining-Code. Each is a folder that stem_jax.prepare wrote; see docs/fine_tuning.md.
The learning rate, down a line to zero from a sixth of its peak, and the batch are ours.
"""

from configs.stem_1b import get_config as stem_1b_config

TOKENS = 100e9


def get_config():
    """Goes on from the newest checkpoint of runs/stem_1b, with its optimizer state."""
    config = stem_1b_config()
    step_tokens = config.train.global_batch_size * config.train.seq_len
    config.train.continue_from = "runs/stem_1b"
    # Counts those behind it, too.
    config.train.steps += round(TOKENS / step_tokens)
    config.data.sources = (
        "stores/olmo_mix_1124=0.65,stores/nemotron_cc_math=0.05,stores/nemotron_code=0.30"
    )
    config.optimizer.schedule = "linear"
    config.optimizer.min_lr_ratio = 0.0
    return config
