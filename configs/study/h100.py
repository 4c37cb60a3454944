"""The study on one GPU in minutes, exploratory: 12 M tokens a run, whole pairs first.

python -m stem_jax.study --config=configs/study/h100.py --workdir=runs/study_gpu --threads=0

It prints what it will take with --dry-run, and stops by itself; the same command continues.
"""

from configs.study.base import get_config as base_config

BATCH, LENGTH = 64, 512


def get_study():
    """D 512, 12 layers, F 1536, V 32000, bfloat16: one pass of the first text."""
    base = base_config()
    base.model.vocab_size = 32000
    base.model.embed_dim = 512
    base.model.num_layers = 12
    base.model.num_heads = 8
    base.model.num_kv_heads = 8
    base.model.ffn_dim = 1536
    base.model.compute_dtype = "bfloat16"
    base.optimizer.learning_rate = 1e-3
    base.train.global_batch_size = BATCH
    base.train.seq_len = LENGTH
    return {
        "name": "h100",
        "base": base,
        "tokens": 12_000_000,
        "texts": {"prose": {"vocab_size": 32000}},
        "baseline": "dense",
        "claims": None,
        # A guess, from 40% of an H100's matmuls; nothing has measured it yet.
        "tokens_per_second": 400_000.0,
        "minutes": 8.0,
        "phases": [
            {
                "purpose": "main",
                "says": "STEM and value embeddings beside the dense model",
                "variants": ("dense", "stem_half", "value"),
                "seeds": (1, 2),
                "rates": (1.0,),
                "compares": True,
            }
        ],
    }
