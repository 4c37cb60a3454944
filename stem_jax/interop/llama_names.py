"""The map between our parameter names and those of Llama in the transformers library.

    ours, kernels [in, out] but down_proj    Llama, linear weights [out, in]
    embed.weight                             model.embed_tokens.weight
    blocks.0.attention_norm.scale            model.layers.0.input_layernorm.weight
    blocks.0.attention.q_proj.kernel         model.layers.0.self_attn.q_proj.weight
    blocks.0.ffn_norm.scale                  model.layers.0.post_attention_layernorm.weight
    blocks.0.ffn.up_proj.kernel              model.layers.0.mlp.up_proj.weight (if there)
    norm.scale                               model.norm.weight
    head.kernel                              lm_head.weight, none if tied

The table of STEM layer N is `model.layers.N.mlp.up_table.weight` [V, F].
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from stem_jax.config import ModelConfig
from stem_jax.model.feed_forward import kinds_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Weight(NamedTuple):
    """One parameter: both names, its shape there, and whether it is transposed there."""

    ours: str
    theirs: str
    shape: tuple[int, ...]
    turned: bool = False

    def exchanged(self, value: np.ndarray) -> np.ndarray:
        """Our value in their layout, or theirs in ours."""
        return value.T if self.turned else value


def llama_weights(config: ModelConfig) -> Iterator[Weight]:
    """Every parameter of the backbone."""
    D, F, V = config.embed_dim, config.ffn_dim, config.vocab_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield Weight("embed.weight", EMBEDDING, (V, D))
    for layer, kind in enumerate(kinds_of(config)):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        yield Weight(f"{ours}.attention_norm.scale", f"{theirs}.input_layernorm.weight", (D,))
        for name, shape in (
            ("q_proj", (queries, D)),
            ("k_proj", (keys, D)),
            ("v_proj", (keys, D)),
            ("o_proj", (D, queries)),
        ):
            yield Weight(
                f"{ours}.attention.{name}.kernel", f"{theirs}.self_attn.{name}.weight", shape, True
            )
        yield Weight(f"{ours}.ffn_norm.scale", f"{theirs}.post_attention_layernorm.weight", (D,))
        for name, shape, turned in (
            ("gate_proj", (F, D), True),
            ("down_proj", (D, F), False),
            ("up_proj", (F, D), True),
        ):
            # Of layers with tables, those beside the row.
            if f"{name}.kernel" in kind.weights(config):
                own = f"{ours}.ffn.{name}.kernel"
                yield Weight(own, f"{theirs}.mlp.{name}.weight", shape, turned)
    yield Weight("norm.scale", "model.norm.weight", (D,))
    if not config.tie_embeddings:
        yield Weight("head.kernel", HEAD, (V, D), True)


def table_names(config: ModelConfig) -> list[str]:
    """The tables, in the order of the STEM layers."""
    return [f"model.layers.{layer}.mlp.up_table.weight" for layer in config.stem_layers]


def llama_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor, with its shape."""
    shapes = {weight.theirs: weight.shape for weight in llama_weights(config)}
    return shapes | dict.fromkeys(table_names(config), (config.vocab_size, config.ffn_dim))
