"""The published 1B model: 16 layers, five of them STEM, a 128256-token vocabulary.

python -m stem_jax.train --config=configs/stem_1b.py --config.data.sources=DIR

Dense 1,498 M parameters; STEM 1,415 M active beside tables of 5,253 M, and the peak learning rate
of 4e-4: as published (arXiv 2601.10639). Length and batch are ours.
"""

from configs.base import get_config as base_config


def get_config():
    """D 2048, 32 query and 8 KV heads, F 8192, untied head, bf16 compute."""
    config = base_config()
    config.model.vocab_size = 128256
    config.model.embed_dim = 2048
    config.model.num_layers = 16
    config.model.num_heads = 32
    config.model.num_kv_heads = 8
    config.model.ffn_dim = 8192
    config.model.stem_layers = "third"
    config.model.rope_theta = 500000.0
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "full"
    config.model.scan_layers = True
    config.data.sources = "corpus"
    config.data.tokenizer = "hf"
    config.data.tokenizer_path = "corpus/tokenizer/tokenizer.json"
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.optimizer.learning_rate = 4e-4
    config.optimizer.warmup_steps = 2000
    config.train.steps = 240_000
    config.train.global_batch_size = 512
    config.train.seq_len = 4096
    config.eval.every = 5000
    config.eval.max_batches = 32
    config.checkpoint.every = 1000
    return config
