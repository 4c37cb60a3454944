"""tiny.py with value embeddings in place of STEM: half of the layers add a token's row to values.

python -m stem_jax.train --config=configs/value_tiny.py
"""

from configs.tiny import get_config as tiny_config


def get_config():
    """Rows of 64 numbers, as wide as the values of both KV heads; nanochat's rates for them."""
    config = tiny_config()
    config.model.stem_layers = "none"
    config.value.layers = "half"
    # Half of the embedding's; here rows and backbone have one rate, scaled so.
    config.value.lr_multiplier = 0.5
    config.value.weight_decay = 0.01
    config.value.beta1 = 0.8
    config.value.beta2 = 0.995
    return config
