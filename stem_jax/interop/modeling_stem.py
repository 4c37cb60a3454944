"""A STEM language model for the transformers library, version 5: Llama, but for its tables.

The feed-forward layers with tables have a row for each token id, which takes the place of the up
projection (`config.stem_site` "up"), that of the gate ("gate"), or is added ("up_add"):

    dense     y = down(silu(gate(x)) * up(x))
    up        y = down(silu(gate(x)) * table[token id])
    gate      y = down(silu(table[token id]) * up(x))
    up_add    y = down(silu(gate(x)) * (up(x) + table[token id]))

    model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)

Names and layout of the weights are those of Llama, and `model.layers.N.mlp.up_table.weight`
[vocab_size, intermediate_size] for a table.
"""

import dataclasses
from types import SimpleNamespace

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .configuration_stem import StemConfig
from .stem_tables import StemTable, WithTables

# The key-value cache has one of these names, by the version of transformers.
_CACHE_NAMES = ["cache", "past_key_values"]
_CACHE = next(f.name for f in dataclasses.fields(CausalLMOutputWithPast) if f.name in _CACHE_NAMES)
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

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        """[B, L, D] of x [B, L, D], and the weights if the implementation has them."""
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        queries = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)
        keys = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)
        values = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)
        cos, sin = position_embeddings
        turned = apply_rotary_pos_emb(queries.float(), keys.float(), cos, sin)
        queries, keys = turned[0].to(values.dtype), turned[1].to(values.dtype)
        cache = kwargs.pop(_CACHE, None)
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


class StemMLP(nn.Module):
    """The feed-forward layer in which a row takes part."""

    def __init__(self, config):
        super().__init__()
        D, F, self.site = config.hidden_size, config.intermediate_size, config.stem_site
        if self.site != "gate":
            self.gate_proj = nn.Linear(D, F, bias=False)
        if self.site != "up":
            self.up_proj = nn.Linear(D, F, bias=False)
        self.down_proj = nn.Linear(F, D, bias=False)
        self.up_table = StemTable(config.vocab_size, F, config.table_device)
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, input_ids):
        rows = self.up_table(input_ids).to(hidden_states.device, hidden_states.dtype)
        gate = rows if self.site == "gate" else self.gate_proj(hidden_states)
        up = rows if self.site == "up" else self.up_proj(hidden_states)
        if self.site == "up_add":
            up = up + rows
        return self.down_proj(self.act_fn(gate) * up)


class StemDecoderLayer(LlamaDecoderLayer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.self_attn = StemAttention(config, layer_idx)
        self.is_stem = layer_idx in config.stem_layers
        if self.is_stem:
            self.mlp = StemMLP(config)

    def forward(self, hidden_states, token_ids=None, **kwargs):
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + (self.mlp(normed, token_ids) if self.is_stem else self.mlp(normed))


class StemPreTrainedModel(WithTables, LlamaPreTrainedModel):
    """What the base model and the one with a head have in common."""

    config_class = StemConfig
    _no_split_modules = ["StemDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = _CACHE_NAMES


class StemModel(StemPreTrainedModel, LlamaModel):
    """The decoder without its head."""

    def __init__(self, config):
        super(LlamaModel, self).__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [StemDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = StemRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        """As LlamaModel, but `input_ids` are always needed, also beside `inputs_embeds`."""
        if input_ids is None:
            raise ValueError(
                "input_ids are missing: STEM layers look up rows by token id, so inputs_embeds "
                "alone are not enough; give the ids of the same tokens too"
            )
        if inputs_embeds is not None and inputs_embeds.shape[:2] != input_ids.shape:
            raise ValueError(
                f"inputs_embeds are {tuple(inputs_embeds.shape)}, input_ids "
                f"{tuple(input_ids.shape)}; give the ids of the same tokens"
            )
        if past_key_values is not None:
            kwargs[_CACHE] = past_key_values
        cache = kwargs.get("cache", kwargs.get(_CACHE))
        if not torch.compiler.is_compiling() and (cache is None or isinstance(cache, Cache)):
            self._check_lengths(input_ids, attention_mask, position_ids, cache)
        if use_cache is None:
            # Positions that restart begin a document where there is no mask and no cache.
            packed = cache is None and attention_mask is None and position_ids is not None
            use_cache = self.config.use_cache and not self.training and not packed
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds,
            use_cache=use_cache,
            token_ids=input_ids,
            **kwargs,
        )

    def _check_lengths(self, input_ids, attention_mask, position_ids, cache):
        B, L = input_ids.shape
        past = 0 if cache is None else cache.get_seq_length()
        if isinstance(past, torch.Tensor):  # of a cache of a fixed length, which bounds it
            return
        context, length = self.config.max_position_embeddings, past + L
        if length > context and position_ids is not None:
            length = int(position_ids.max()) + 1  # of the longest of several documents in a row
        if length > context:
            raise ValueError(
                f"{length} tokens are more than config.max_position_embeddings={context} that the "
                "model was trained with; give fewer, or raise that to try all the same"
            )
        padded = attention_mask is not None and attention_mask.dim() == 2
        if padded and attention_mask.shape != (B, past + L):
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}; it must be {(B, past + L)}: one "
                "value for each token so far, 0 for padding"
            )


class StemForCausalLM(StemPreTrainedModel, LlamaForCausalLM):
    """The decoder with its head; called as LlamaForCausalLM, but with ids, as the base model."""

    def __init__(self, config):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = StemModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def generate(self, inputs=None, *args, **kwargs):
        """As in the base class, from token ids."""
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "inputs_embeds are for forward only: the tokens that generate adds have none; give "
                "input_ids alone"
            )
        return super().generate(inputs, *args, **kwargs)

    def _prepare_generated_length(self, *args, **kwargs):
        """What is asked for beyond the context ends there: `forward` would raise, all be lost."""
        config = super()._prepare_generated_length(*args, **kwargs)
        config.max_length = min(config.max_length, self.config.max_position_embeddings)
        return config
