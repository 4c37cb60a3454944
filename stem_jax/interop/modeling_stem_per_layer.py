"""Per-layer embeddings for `modeling_stem`: behind each FFN, a row and an embedding gate x.

    p = (norm(W_p e) + sqrt(P) table[token id]) / sqrt(2)
    x += norm(W_o (gelu_tanh(W_i x) * p))

In the layers `config.memories["per_layer"]["layers"]`; P is `["width"]`, e the token's embedding.
Weights are those of `model.layers.N.per_layer`: `table` [vocab_size, P], `embed_proj` W_p,
`embed_norm`, `gate_proj` W_i, `out_proj` W_o and `out_norm`.
"""

from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .configuration_stem import StemConfig, StemPerLayerConfig
from .modeling_stem import StemDecoderLayer, StemForCausalLM, StemModel
from .stem_tables import StemTable


class PerLayerReader(nn.Module):
    """What is added to x [B, L, D]."""

    def __init__(self, config):
        super().__init__()
        D, P = config.hidden_size, config.memories["per_layer"]["width"]
        self.width = P
        self.gate_proj = nn.Linear(D, P, bias=False)
        self.embed_proj = nn.Linear(D, P, bias=False)
        self.embed_norm = LlamaRMSNorm(P, config.rms_norm_eps)
        self.out_proj = nn.Linear(P, D, bias=False)
        self.out_norm = LlamaRMSNorm(D, config.rms_norm_eps)
        self.table = StemTable(config.vocab_size, P, config.table_device)

    def forward(self, hidden_states, token_ids, embeds):
        rows = self.width**0.5 * self.table(token_ids).to(hidden_states.device, hidden_states.dtype)
        p = (self.embed_norm(self.embed_proj(embeds)) + rows) * 0.5**0.5
        gate = F.gelu(self.gate_proj(hidden_states), approximate="tanh")
        return self.out_norm(self.out_proj(gate * p))


class PerLayerDecoderLayer(StemDecoderLayer):
    """STEM's, and behind it what a row adds."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        if layer_idx in config.memories["per_layer"]["layers"]:
            self.per_layer = PerLayerReader(config)

    def forward(self, hidden_states, token_ids=None, embeds=None, **kwargs):
        hidden_states = super().forward(hidden_states, token_ids, **kwargs)
        if not hasattr(self, "per_layer"):
            return hidden_states
        return hidden_states + self.per_layer(hidden_states, token_ids, embeds)


class StemPerLayerModel(StemModel):
    """The decoder without its head."""

    config_class: type[StemConfig] = StemPerLayerConfig
    layer_class = PerLayerDecoderLayer
    memories: tuple[str, ...] = ("per_layer",)

    def layer_inputs(self, input_ids, embeds):
        return {**super().layer_inputs(input_ids, embeds), "embeds": embeds}


class StemPerLayerForCausalLM(StemForCausalLM):
    """The decoder with its head."""

    config_class = StemPerLayerConfig
    model_class = StemPerLayerModel
