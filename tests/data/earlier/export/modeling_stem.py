"""A STEM language model for the transformers library, version 5: this file, PyTorch, nothing else.

The up projection of some feed-forward layers is a table indexed by the token id:

    dense layer   y = down(silu(gate(x)) * up(x))
    STEM layer    y = down(silu(gate(x)) * table[token id])

    model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)

`table_device="cpu"` keeps the tables in host memory when the rest moves to an accelerator; only the
rows of the tokens at hand then travel:

    model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True, table_device="cpu")
    model.to("cuda")

Names and layout of the weights are those of Llama, but for `model.layers.N.mlp.up_table.weight`
[vocab_size, intermediate_size] in place of the up projection of a STEM layer.
"""

import dataclasses

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# transformers 5.24 renamed the key-value cache, which it passes to `forward` and reads from the
# output.
_CACHE_NAMES = ["cache", "past_key_values"]
_CACHE_FIELD = next(
    field.name for field in dataclasses.fields(CausalLMOutputWithPast) if field.name in _CACHE_NAMES
)


class StemConfig(PretrainedConfig):
    """Sizes under the names of Llama's configuration, and `stem_layers`, the layers with tables.

    table_device: where the tables stay whatever `model.to` says; None: with the rest.
    """

    model_type = "stem"
    keys_to_ignore_at_inference = _CACHE_NAMES

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        stem_layers=(),
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters=None,
        initializer_range=0.02,
        use_cache=True,
        table_device=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.stem_layers = list(stem_layers)
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.table_device = table_device
        super().__init__(**kwargs)


class StemRMSNorm(nn.Module):
    """x / rms(x) * weight, in float32."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (x32 * scale * self.weight.float()).to(x.dtype)


class StemTable(nn.Module):
    """Rows [V, F] by token id, which may stay on a device of their own."""

    def __init__(self, vocab_size, width, device):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        self.device = None if device is None else torch.device(device)

    def forward(self, input_ids, like):
        rows = F.embedding(input_ids.to(self.weight.device), self.weight)
        return rows.to(like.device, like.dtype)

    def _apply(self, fn, recurse=True):
        if self.device is None:
            return super()._apply(fn, recurse)

        def stay(tensor):
            if tensor.is_meta:
                return fn(tensor)
            # What `fn` would make of a tensor without elements tells the dtype that it asks for.
            return tensor.to(self.device, fn(tensor.new_empty(0)).dtype)

        return super()._apply(stay, recurse)


class StemAttention(nn.Module):
    """Causal attention in which several query heads share a key-value head."""

    def __init__(self, config, layer):
        super().__init__()
        D, Dh = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * Dh, config.num_key_value_heads * Dh
        self.q_proj = nn.Linear(D, queries, bias=False)
        self.k_proj = nn.Linear(D, keys, bias=False)
        self.v_proj = nn.Linear(D, keys, bias=False)
        self.o_proj = nn.Linear(queries, D, bias=False)
        self.config = config
        self.layer = layer

    def forward(self, x_BxLxD, angles, mask_Bx1xLxT, cache):
        """Without a mask, one query sees every key, and several are as many as there are keys."""
        B, L, _ = x_BxLxD.shape
        H, Dh = self.config.num_attention_heads, self.config.head_dim
        q, k, v = (
            project(x_BxLxD).view(B, L, -1, Dh).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, angles), _rotate(k, angles)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        group = H // self.config.num_key_value_heads
        if self.config._attn_implementation == "eager":
            k, v = (part.repeat_interleave(group, dim=1) for part in (k, v))
            scores = (q @ k.transpose(2, 3)).float() * Dh**-0.5
            scores = scores.masked_fill(~mask_Bx1xLxT, float("-inf"))
            out = scores.softmax(-1).to(v.dtype) @ v
        elif L == 1:
            # The heads of a group as if they were positions: the cache is not copied for each.
            q = q.reshape(B, -1, group, Dh)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_Bx1xLxT)
            out = out.reshape(B, H, 1, Dh)
        else:
            causal, gqa = mask_Bx1xLxT is None, group > 1
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask_Bx1xLxT, is_causal=causal, enable_gqa=gqa
            )
        return self.o_proj(out.transpose(1, 2).reshape(B, L, -1))


class StemMLP(nn.Module):
    """The gated feed-forward layer; its up values come from a projection or from the table."""

    def __init__(self, config, layer):
        super().__init__()
        D, width = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, width, bias=False)
        self.down_proj = nn.Linear(width, D, bias=False)
        self.is_stem = layer in config.stem_layers
        if self.is_stem:
            self.up_table = StemTable(config.vocab_size, width, config.table_device)
        else:
            self.up_proj = nn.Linear(D, width, bias=False)

    def forward(self, x, input_ids):
        up = self.up_table(input_ids, x) if self.is_stem else self.up_proj(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * up)


class StemDecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = StemRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = StemAttention(config, layer)
        self.post_attention_layernorm = StemRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = StemMLP(config, layer)

    def forward(self, x, input_ids, angles, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), angles, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x), input_ids)


class StemModel(nn.Module):
    """The decoder without its head."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [StemDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)]
        )
        self.norm = StemRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.config = config

    def forward(self, input_ids, x_BxLxD, attention_mask, position_ids, cache, keep_hidden=False):
        """The normed output, and the hidden states before and between the layers if kept."""
        B, L = input_ids.shape
        past = 0 if cache is None else cache.get_seq_length()
        if past + L > self.config.max_position_embeddings:
            raise ValueError(
                f"{past + L} tokens are more than the context of max_position_embeddings="
                f"{self.config.max_position_embeddings} that the model was trained with; give "
                "fewer, or raise config.max_position_embeddings to try all the same"
            )
        device = x_BxLxD.device
        slots_T = torch.arange(past + L, device=device)
        queries_L = slots_T[past:]
        if attention_mask is not None:
            if attention_mask.shape != (B, past + L):
                raise ValueError(
                    f"attention_mask is {tuple(attention_mask.shape)}; it must be "
                    f"{(B, past + L)}: one value for each token so far, 0 for padding"
                )
            attention_mask = attention_mask.to(device).bool()
            # Asking for values would end a compilation.
            if not (attention_mask.is_meta or torch.compiler.is_compiling()):
                attention_mask = None if attention_mask.all() else attention_mask
        # Attention needs none for the whole causal square, nor for one token that sees all others.
        plain = attention_mask is None and (past == 0 or L == 1)
        if plain and self.config._attn_implementation != "eager":
            mask_Bx1xLxT = None
        else:
            mask = slots_T[None, :] <= queries_L[:, None]
            mask_Bx1xLxT = mask.expand(B, L, past + L)[:, None]
        if attention_mask is not None:
            # Padding sees itself, so that no row is empty and becomes NaN.
            itself = slots_T[None, :] == queries_L[:, None]
            mask_Bx1xLxT = (mask_Bx1xLxT & attention_mask[:, None, None, :]) | itself
            if position_ids is None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        if position_ids is None:
            position_ids = queries_L[None]
        angles = self._angles(position_ids.to(device))
        before = []
        for layer in self.layers:
            if keep_hidden:
                before.append(x_BxLxD)
            x_BxLxD = layer(x_BxLxD, input_ids, angles, mask_Bx1xLxT, cache)
        return self.norm(x_BxLxD), before

    def _angles(self, position_ids):
        """Cosines and sines [B, 1, L, head_dim / 2], float32."""
        rope, device = self.config.rope_parameters, position_ids.device
        scale = 1.0
        if rope["rope_type"] == "default":
            pairs = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=device)
            frequencies = 1.0 / rope["rope_theta"] ** (pairs / self.config.head_dim)
        else:
            frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](self.config, device)
        angles = position_ids[:, None, :, None].float() * frequencies
        return angles.cos() * scale, angles.sin() * scale


class StemForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder with its head."""

    config_class = StemConfig
    base_model_prefix = "model"
    _no_split_modules = ["StemDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = _CACHE_NAMES
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = StemModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, path, *args, config=None, device_map=None, **kwargs):
        """As in the base class; with `table_device`, `device_map` may name one device only."""
        pinned = None
        if "table_device" in kwargs:
            pinned = kwargs["table_device"]
        elif isinstance(config, PretrainedConfig):
            pinned = getattr(config, "table_device", None)
        elif device_map is not None:
            values, _ = cls.config_class.get_config_dict(config or path, **kwargs)
            pinned = values.get("table_device")
        if pinned is None or device_map is None:
            return super().from_pretrained(
                path, *args, config=config, device_map=device_map, **kwargs
            )
        if isinstance(device_map, dict) or device_map in ("auto", "balanced", "sequential"):
            raise ValueError(
                f"device_map={device_map!r} cannot be had with table_device={pinned!r}; name one "
                'device, such as device_map="cuda", or leave out table_device'
            )
        model = super().from_pretrained(path, *args, config=config, **kwargs)
        return model.to(device_map)

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, StemTable):
            V, width = module.weight.shape
            nn.init.normal_(module.weight, std=(2 / (V + width)) ** 0.5)

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def resize_token_embeddings(self, *args, **kwargs):
        raise ValueError("the tables have a row for each token id: the vocabulary cannot change")

    def generate(self, inputs=None, *args, **kwargs):
        """As in the base class, from token ids."""
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "inputs_embeds are for forward only: the tokens that generate adds have none; give "
                "input_ids alone"
            )
        return super().generate(inputs, *args, **kwargs)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        output_hidden_states=None,
        return_dict=None,
        cache=None,
        **kwargs,
    ):
        """As LlamaForCausalLM, but `input_ids` are always needed, also beside `inputs_embeds`.

        `cache` and `past_key_values` are two names of one argument.
        """
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
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None:
            cache = past_key_values
        if cache is None and use_cache:
            cache = DynamicCache()
        if getattr(cache, "is_compileable", False):
            raise ValueError(
                f"a {type(cache).__name__} has a fixed length, which this model does not support; "
                'give a DynamicCache, or leave out cache_implementation="static"'
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        last, before = self.model(
            input_ids, x, attention_mask, position_ids, cache, output_hidden_states
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(last[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=(*before, last) if output_hidden_states else None,
            **{_CACHE_FIELD: cache if use_cache else None},
        )
        return output.to_tuple() if return_dict is False else output


def _rotate(x_BxHxLxD, angles):
    """Turns the pairs (i, i + head_dim / 2), in float32."""
    cos, sin = angles
    first, second = x_BxHxLxD.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x_BxHxLxD.dtype)
