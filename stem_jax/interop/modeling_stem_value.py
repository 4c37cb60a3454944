"""Value embeddings for `modeling_stem`: rows are added to attention's values, through a gate.

    v += 3 sigmoid(W x[:12])_head * table[token id]

In the layers `config.memories["value"]["layers"]`, x is attention's normed input. The table is
`model.layers.N.self_attn.value_table.weight` [vocab_size, KV heads * head_dim], head by head; W is
`model.layers.N.self_attn.value_gate.weight` [KV heads, 12].
"""

import torch
from torch import nn

from .configuration_stem import StemValueConfig
from .modeling_stem import StemAttention, StemDecoderLayer, StemForCausalLM, StemModel
from .stem_tables import StemTable

GATE_INPUTS = 12


class ValueAttention(StemAttention):
    """Attention whose values have rows added to them."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.reads_values = layer_idx in config.memories["value"]["layers"]
        if self.reads_values:
            heads = config.num_key_value_heads
            self.value_gate = nn.Linear(GATE_INPUTS, heads, bias=False)
            width = heads * config.head_dim
            self.value_table = StemTable(config.vocab_size, width, config.table_device)

    def values(self, hidden_states, token_ids):
        values = super().values(hidden_states, token_ids)
        if not self.reads_values:
            return values
        width = self.config.num_key_value_heads * self.head_dim
        if values.shape[-1] != width:
            # Without this check the rows of other heads could be added.
            raise ValueError(
                f"{values.shape[-1]} of {width} values are on this device: value embeddings add "
                "rows of all heads, so tensor parallelism cannot divide them; use one device "
                "(vLLM: --tensor-parallel-size=1)"
            )
        gate = 3 * torch.sigmoid(self.value_gate(hidden_states[..., :GATE_INPUTS]))
        rows = self.value_table(token_ids).to(values.device, values.dtype)
        return values + (gate[..., None] * rows.unflatten(-1, (-1, self.head_dim))).flatten(-2)


class ValueDecoderLayer(StemDecoderLayer):
    """STEM's, with that attention."""

    attention_class = ValueAttention


class StemValueModel(StemModel):
    """The decoder without its head."""

    config_class = StemValueConfig
    layer_class = ValueDecoderLayer
    memories = ("value",)


class StemValueForCausalLM(StemForCausalLM):
    """The decoder with its head."""

    config_class = StemValueConfig
    model_class = StemValueModel
