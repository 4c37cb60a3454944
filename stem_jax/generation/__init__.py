"""Text from a model: decoding with a cache, sampling, completions."""
