"""transformers' n-gram memory and its reader, which ours are compared with."""

import functools

import numpy as np
import torch
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import (
    Qwen4ExpTextNGramEmbedding,
    Qwen4ExpTextPLELayer,
)

from stem_jax.memory.ngram import NGramMemory

# Of the two layers that read.
LAYERS = (1, 4)
EOS = 3


def tokens_with_eos(vocab_size: int, length: int, seed: int = 0) -> np.ndarray:
    """[8, L]: eos nowhere, at the start, at the end, twice in a row, often; others are drawn."""
    rng = np.random.default_rng(seed)
    tokens_BxL = rng.integers(4, vocab_size, (8, length), np.int32)
    middle = length // 2
    tokens_BxL[1, 0] = tokens_BxL[2, -1] = EOS
    tokens_BxL[3, middle : middle + 2] = EOS
    tokens_BxL[4, :2] = tokens_BxL[5, -2:] = EOS
    tokens_BxL[6:][rng.random((2, length)) < 0.4] = EOS
    tokens_BxL[7, middle:] = vocab_size - 1
    return tokens_BxL


def memory(vocab_size=97, max_order=3, heads=2, keys_per_head=None, **others) -> NGramMemory:
    """Ours, small, for two layers."""
    fields = {
        "layers": LAYERS,
        "keys_per_head": keys_per_head or vocab_size,
        "total_width": 6 * (max_order - 1) * heads,
        "seed": 1234,
        "eos_id": EOS,
    }
    return NGramMemory(vocab_size=vocab_size, max_order=max_order, heads=heads, **(fields | others))


def _config(ours: NGramMemory, embed_dim: int) -> Qwen4ExpTextConfig:
    config = Qwen4ExpTextConfig(
        vocab_size=ours.vocab_size,
        hidden_size=embed_dim,
        num_hidden_layers=8,
        ple_layer_ids=[layer + 1 for layer in ours.layers],
        layer_types=["linear_attention"] * 8,
        ple_embed_dim=ours.total_width,
        ngram_size=ours.max_order,
        heads_per_ngram=ours.heads,
        ngram_vocab_size_base=ours.keys_per_head,
        make_ngram_vocab_size_divisible_by=ours.pad_multiple,
        seed=ours.seed,
        eos_token_id=ours.eos_id,
    )
    # It refuses one stream, which is what the paper has.
    config.hc_count = 1
    return config


@functools.cache
def ngram_embedding(ours: NGramMemory, place: int) -> Qwen4ExpTextNGramEmbedding:
    """Theirs, of the layer at a place of the list."""
    config = _config(ours, 8)
    return Qwen4ExpTextNGramEmbedding(config, ours.total_width, ours.layers[place], place)


def their_ids(ours: NGramMemory, place: int, tokens_BxL: np.ndarray) -> np.ndarray:
    """What theirs looks up, [B, L, (N - 1) H], counted from 0 in the layer's own table."""
    module, seen = ngram_embedding(ours, place), []
    hook = module.ngram_embedding.register_forward_pre_hook(lambda _, ids: seen.append(ids[0]))
    try:
        module(torch.from_numpy(tokens_BxL), None)
    finally:
        hook.remove()
    return seen[0].numpy()


def ple_layer(ours: NGramMemory, place: int, embed_dim: int, seed: int = 0) -> Qwen4ExpTextPLELayer:
    """Theirs, with all weights drawn, those of norms and convolution too."""
    module = Qwen4ExpTextPLELayer(_config(ours, embed_dim), ours.layers[place], place)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) * 0.3)
    return module
