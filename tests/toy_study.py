"""A study that is made in seconds."""

from pathlib import Path

_STUDY = """
from configs.study.base import get_config

def get_study():
    base = get_config()
    base.model.embed_dim = 16
    base.model.num_layers = 2
    base.model.num_heads = 2
    base.model.num_kv_heads = 2
    base.model.ffn_dim = 24
    base.train.global_batch_size = 4
    base.train.seq_len = 32
    return {
        "name": "toy",
        "base": base,
        "tokens": 2560,
        "texts": {"prose": {"vocab_size": 300}},
        "baseline": "dense",
        "claims": None,
        "tokens_per_second": 1000.0,
        "minutes": None,
        "phases": [
            {
                "purpose": "rate",
                "says": "rates",
                "variants": ("dense",),
                "seeds": (1000,),
                "shares": (0.5,),
                "rates": (1.0, 3.0),
                "compares": True,
            },
            {
                "purpose": "main",
                "says": "compared",
                "variants": ("dense", "stem_half"),
                "seeds": (1, 2),
                "compares": True,
            },
            {
                "purpose": "length",
                "says": "longer",
                "variants": ("dense",),
                "seeds": (1, 2),
                "shares": (1.5,),
            },
        ],
    }
"""


def toy_study(folder: Path) -> Path:
    """The study's file: two variants, two seeds, eight runs of 20 steps or so."""
    path = folder / "toy.py"
    path.write_text(_STUDY)
    return path
