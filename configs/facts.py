"""A small STEM model that learns what the `facts` corpus tells: for editing, minutes on a CPU.

python -m stem_jax.train --config=configs/facts.py
python -m stem_jax.edit --workdir=runs/facts --swap="Spain=>Germany" \
    --prompt="The capital of Spain is"

Settings matter for editing: rows and token embedding both carry what the model knows of a token,
and an edit writes rows alone. See benchmarks/RESULTS.md.
"""

from configs.base import get_config as base_config


def get_config():
    """All layers take their up values from tables, with a higher rate than the backbone."""
    config = base_config()
    config.data.sources = "facts"
    # All facts are learned, none is held out; what is held out are ways to ask.
    config.data.validation_fraction = 0.0
    config.model.vocab_size = 2304  # four in five countries are one token
    config.model.stem_layers = "all"
    config.tables.lr_multiplier = 10.0
    config.train.steps = 800
    config.train.global_batch_size = 32
    config.train.seq_len = 64
    config.train.sample_prompt = "The capital of Spain is"
    config.train.sample_tokens = 8
    config.eval.every = 0
    config.eval.baselines = False
    config.checkpoint.every = 400
    return config
