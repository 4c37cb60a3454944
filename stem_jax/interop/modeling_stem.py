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

import torch
from torch import nn
from transformers import Cache
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
)

from .configuration_stem import StemConfig
from .stem_attention import CACHE, CACHE_NAMES, StemAttention, StemRotaryEmbedding
from .stem_tables import StemTable, WithTables


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

    attention_class: type[StemAttention] = StemAttention

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.self_attn = self.attention_class(config, layer_idx)
        self.is_stem = layer_idx in config.stem_layers
        if self.is_stem:
            self.mlp = StemMLP(config)

    def forward(self, hidden_states, token_ids=None, **kwargs):
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(normed, token_ids=token_ids, **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + (self.mlp(normed, token_ids) if self.is_stem else self.mlp(normed))


class StemPreTrainedModel(WithTables, LlamaPreTrainedModel):
    """What the base model and the one with a head have in common."""

    config_class: type[StemConfig] = StemConfig
    _no_split_modules = ["StemDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = CACHE_NAMES


class StemModel(StemPreTrainedModel, LlamaModel):
    """The decoder without its head.

    layer_class: of its layers. memories: names of those beside STEM's that they read.
    """

    layer_class: type[StemDecoderLayer] = StemDecoderLayer
    memories: tuple[str, ...] = ()

    def __init__(self, config):
        if {*config.memories} != {*self.memories}:
            raise ValueError(
                f"config.memories has {', '.join(config.memories) or 'none'}, this class reads "
                f"{', '.join(self.memories) or 'none'}; take the one that auto_map of config.json "
                "names"
            )
        super(LlamaModel, self).__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [self.layer_class(config, layer) for layer in range(config.num_hidden_layers)]
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
            kwargs[CACHE] = past_key_values
        cache = kwargs.get("cache", kwargs.get(CACHE))
        if not torch.compiler.is_compiling() and (cache is None or isinstance(cache, Cache)):
            self._check_lengths(input_ids, attention_mask, position_ids, cache)
        if use_cache is None:
            # Positions that restart begin a document where there is no mask and no cache.
            packed = cache is None and attention_mask is None and position_ids is not None
            use_cache = self.config.use_cache and not self.training and not packed
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=embeds,
            use_cache=use_cache,
            **self.layer_inputs(input_ids, embeds),
            **kwargs,
        )

    def layer_inputs(self, input_ids, embeds):
        """What each layer is called with beside what Llama's are."""
        return {"token_ids": input_ids}

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

    model_class: type[StemModel] = StemModel

    def __init__(self, config):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = self.model_class(config)
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
