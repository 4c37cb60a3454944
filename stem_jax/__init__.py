"""stem_jax: training, inference and analysis of transformers with token-indexed FFN tables."""
