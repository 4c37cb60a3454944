"""A small model that learns to look back: needles in a haystack, minutes on two CPU cores.

python -m stem_jax.train --config=configs/needle_pairs.py
python -m stem_jax.train --config=configs/needle.py
python -m stem_jax.evaluate --workdir=runs/needle --niah --keys=1,4

Begins with runs/needle_pairs: a model that has not learned to look back from short documents does
not learn it from haystacks in this time.
"""

from configs.base import get_config as base_config


def get_config():
    """Looking back takes two layers; the third reads its up values from a table."""
    config = base_config()
    config.data.sources = "needles=0.5,roll_calls=0.5"
    config.model.vocab_size = 768
    config.model.embed_dim = 64
    config.model.num_layers = 3
    config.model.ffn_dim = 128
    config.model.stem_layers = "2"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.schedule = "wsd"
    config.optimizer.decay_fraction = 0.2
    config.optimizer.warmup_steps = 50
    config.train.init_from = "runs/needle_pairs"
    config.train.steps = 4500
    config.train.global_batch_size = 8
    config.train.seq_len = 256
    config.train.sample_prompt = (
        "The agent Clara Heron is here. The sky is blue. The agent Peter Wolf is here.\n"
        "Who is Clara? The agent Clara"
    )
    config.train.sample_tokens = 2
    config.eval.every = 500
    config.eval.baselines = False
    config.checkpoint.every = 500
    return config
