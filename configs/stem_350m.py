"""MobileLLM-350M with STEM layers, half of its 32.

python -m stem_jax.train --config=configs/stem_350m.py --config.data.sources=DIR

The 350M model of STEM (arXiv 2601.10639) is MobileLLM-350M (arXiv 2402.14905; widths as in
huggingface.co/facebook/MobileLLM-350M), which ties head and embedding: 345 M parameters, here 376 M
with a head of its own. In all there are 1.25 B with a third of the layers STEM, 1.65 B with half
and 2.84 B with all but the first; the 1.85 B and 3.25 B that the paper gives do not follow from
these widths. Rate, length and batch are ours.
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
