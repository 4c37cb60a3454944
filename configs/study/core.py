"""The study at the size that anyone can run: what memories are worth, on CPUs, in hours.

python -m stem_jax.study --config=configs/study/core.py --workdir=runs/study [--workers=2]
"""

from configs.study.base import TOKENS
from configs.study.base import get_config as base_config

SEEDS = (1, 2, 3, 4, 5)
# Trials of the rate are made on a seed that nothing else uses.
RATE_SEED = 1000
COMPARED = ("dense", "stem_half", "dense_minus", "gate", "hash_moe", "value", "ngram")


def get_study():
    """Phases in the order of their worth: a study that is cut still answers the first."""
    return {
        "name": "core",
        "base": base_config(),
        "tokens": TOKENS,
        "texts": {
            "prose": {"vocab_size": 2048},
            "code": {"vocab_size": 2048},
            "facts": {
                "vocab_size": 1224,
                "keys": {"train.seq_len": 64, "train.global_batch_size": 32},
            },
        },
        "baseline": "dense",
        "claims": "claims",
        # One core of an AMD EPYC, with huge pages, beside another worker.
        "tokens_per_second": 25_000.0,
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
            {
                "purpose": "length",
                "says": "the dense model at other lengths, each with its whole schedule",
                "variants": ("dense",),
                "seeds": SEEDS,
                "shares": (0.5, 0.75, 1.25, 1.5),
            },
            {
                "purpose": "resampling",
                "says": "five more seeds of the dense model, for A against A",
                "variants": ("dense",),
                "seeds": (6, 7, 8, 9, 10),
            },
            {
                "purpose": "planted",
                "says": "the dense model with a tenth fewer tokens: a difference to be found",
                "variants": ("dense",),
                "seeds": SEEDS,
                "shares": (0.9,),
            },
            {
                "purpose": "facts",
                "says": "what is remembered of countries whose names are one token or several",
                "variants": ("dense", "stem_half", "value", "ngram"),
                "seeds": SEEDS,
                "text": "facts",
                # Eight times all that is told.
                "shares": (0.4,),
            },
            {
                "purpose": "second",
                "says": "the same on another text",
                "variants": ("dense", "stem_half", "value"),
                "seeds": SEEDS,
                "text": "code",
            },
            {
                "purpose": "common",
                "says": "dense and STEM at the rate that is the base's",
                "variants": ("dense", "stem_half"),
                "seeds": SEEDS,
                "rates": (1.0,),
            },
            {
                "purpose": "others",
                "says": "other places and memories",
                "variants": ("stem_third", "stem_all", "up_add", "stem_ngram", "per_layer"),
                "seeds": SEEDS,
            },
        ],
    }
