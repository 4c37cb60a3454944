"""Attention of a STEM language model for the transformers library: Llama's, turned in float32."""

import dataclasses
from types import SimpleNamespace

from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

# The key-value cache has one of these names, by the version of transformers.
CACHE_NAMES = ["cache", "past_key_values"]
CACHE = next(f.name for f in dataclasses.fields(CausalLMOutputWithPast) if f.name in CACHE_NAMES)
if not hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):  # transformers 5.0
    _found = ALL_ATTENTION_FUNCTIONS.get
    ALL_ATTENTION_FUNCTIONS = SimpleNamespace(get_interface=_found)  # type: ignore[assignment]


class StemRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's in float32, also when the model is cast."""

    def forward(self, x, position_ids):
        """Cosines and sines [B, L, head_dim]."""
        return super().forward(x[..., :1].float(), position_ids)

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if not buffer.is_meta:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


class StemAttention(LlamaAttention):
    """Llama's, but that queries and keys turn in float32."""

    def forward(
        self, hidden_states, position_embeddings, attention_mask=None, token_ids=None, **kwargs
    ):
        """[B, L, D] of x [B, L, D], and the weights if the implementation has them."""
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        queries = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)
        keys = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)
        values = self.values(hidden_states, token_ids).view(head_shape).transpose(1, 2)
        cos, sin = position_embeddings
        turned = apply_rotary_pos_emb(queries.float(), keys.float(), cos, sin)
        queries, keys = turned[0].to(values.dtype), turned[1].to(values.dtype)
        cache = kwargs.pop(CACHE, None)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx, kwargs)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attention_interface(
            self,
            queries,
            keys,
            values,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attended.reshape(*input_shape, -1).contiguous()), weights

    def values(self, hidden_states, token_ids):
        """[B, L, K * Dh] of x [B, L, D]; a memory adds to them."""
        return self.v_proj(hidden_states)
