"""The opponents of `benchmarks.train_step`: training steps of PyTorch, compiled.

LlamaForCausalLM of transformers as it comes, and the same with the up projection of some layers
replaced by an embedding. Both use AdamW in its fused form on all parameters, tables included: an
embedding's gradient is dense there, as it is in the code that was published with the paper.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from stem_jax.config import Config


class StemMLP(nn.Module):
    """y = down(silu(gate(x)) * table[token]), with the projections of the layer it replaces.

    ids: int64 [B, L], the tokens of the batch. A decoder layer hands on no tokens, so they are set
    before the step.
    """

    def __init__(self, dense: nn.Module, vocab_size: int):
        super().__init__()
        self.gate_proj, self.down_proj = dense.gate_proj, dense.down_proj
        self.table = nn.Embedding(vocab_size, dense.gate_proj.out_features)
        nn.init.normal_(self.table.weight, std=0.02)
        self.ids: torch.Tensor | None = None

    def forward(self, x_BxLxD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BxLxD)) * self.table(self.ids))


class TorchStep:
    """A compiled step on a fixed batch; calling it makes one update."""

    def __init__(self, config: Config, tokens_BxL):
        """Args: `config` gives the shape, `model.stem_layers` included; tokens are int64 ids."""
        model = config.model
        self.tokens = torch.from_numpy(tokens_BxL.copy())
        network = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=model.vocab_size,
                hidden_size=model.embed_dim,
                intermediate_size=model.ffn_dim,
                num_hidden_layers=model.num_layers,
                num_attention_heads=model.num_heads,
                num_key_value_heads=model.num_kv_heads,
                max_position_embeddings=config.train.seq_len,
                tie_word_embeddings=False,
                use_cache=False,
            )
        )
        for layer in model.stem_layers:
            replaced = StemMLP(network.model.layers[layer].mlp, model.vocab_size)
            replaced.ids = self.tokens
            network.model.layers[layer].mlp = replaced
        self.parameters = list(network.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.network = torch.compile(network)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.network(input_ids=self.tokens, labels=self.tokens).loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
