"""The other end: a wider model with few tokens for each of its parameters.

python -m stem_jax.study --config=configs/study/wide.py --workdir=runs/study_wide [--workers=2]
"""

from configs.study.base import get_config as base_config
from configs.study.core import RATE_SEED, SEEDS

COMPARED = ("dense", "stem_half", "value")


def get_study():
    """D 192, 6 layers, F 512: .3 tokens for each parameter."""
    base = base_config()
    base.model.embed_dim = 192
    base.model.num_layers = 6
    base.model.num_heads = 6
    base.model.num_kv_heads = 6
    base.model.ffn_dim = 512
    return {
        "name": "wide",
        "base": base,
        "tokens": 1_200_000,
        "texts": {"prose": {"vocab_size": 2048}},
        "baseline": "dense",
        "claims": None,
        # A guess from the core size and FLOPs.
        "tokens_per_second": 4_000.0,
        "minutes": None,
        "phases": [
            {
                "purpose": "rate",
                "says": "each variant's learning rate, chosen on dev",
                "variants": COMPARED,
                "seeds": (RATE_SEED,),
                "shares": (0.5,),
                "rates": (1 / 3, 1.0, 3.0),
                "compares": True,
            },
            {
                "purpose": "main",
                "says": "variants beside the dense model",
                "variants": COMPARED,
                "seeds": SEEDS,
                "compares": True,
            },
        ],
    }
