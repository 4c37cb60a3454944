"""A model of the published 350M class: 32 layers, half of them STEM.

python -m stem_jax.train --config=configs/stem_350m.py --config.data.sources=DIR

The official repository does not publish the exact widths of its 350M model. These (D 960, 15 query
and 5 KV heads, F 2560) give 0.37 B dense parameters and, with half the layers STEM, close to the
published 1.85 B total / 0.34 B active.
"""

from configs.base import get_config as base_config


def get_config():
    """V 32000, untied head, bf16 compute; 512 sequences of 2048 tokens a step."""
    config = base_config()
    config.model.vocab_size = 32000
    config.model.embed_dim = 960
    config.model.num_layers = 32
    config.model.num_heads = 15
    config.model.num_kv_heads = 5
    config.model.ffn_dim = 2560
    config.model.stem_layers = "half"
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "full"
    config.model.scan_layers = True
    config.data.sources = "corpus"
    config.data.tokenizer_path = "corpus/tokenizer/tokenizer.model"
    # Wider shards than D / 4 are no use at this size: more, smaller gathers.
    config.mesh.data = -1
    config.mesh.fsdp = 4
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 2000
    config.train.steps = 100_000
    config.train.global_batch_size = 512
    config.train.micro_batches = 4
    config.train.seq_len = 2048
    config.eval.every = 2000
    config.eval.max_batches = 32
    config.checkpoint.every = 1000
    return config
