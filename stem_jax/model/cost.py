"""Parameters and matmul FLOPs of a configuration. Table lookups are no FLOPs and not counted."""

import dataclasses

from stem_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters.

    active: the backbone, which every token uses. table: all rows of all STEM layers. per_token:
    the backbone and one row, what one token touches.
    """

    active: int
    table: int
    per_token: int

    @property
    def total(self) -> int:
        """Everything that is trained and stored."""
        return self.active + self.table


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Counts from the shapes alone."""
    D, F, Dh = model.embed_dim, model.ffn_dim, model.head_dim
    attention = 2 * D * model.num_heads * Dh + 2 * D * model.num_kv_heads * Dh
    up_layers = model.num_layers - model.num_stem_layers
    ffn = (2 * model.num_layers + up_layers) * D * F
    norms = (2 * model.num_layers + 1) * D
    embeddings = (1 if model.tie_embeddings else 2) * model.vocab_size * D
    dropped = D if model.token_embedding_dropout > 0 else 0
    active = model.num_layers * attention + ffn + norms + embeddings + dropped
    row = model.num_stem_layers * F
    return ParameterCount(active, model.vocab_size * row, active + row)


def forward_flops_per_token(model: ModelConfig, context: int) -> int:
    """Matmul FLOPs of one token's forward pass, head included.

    Attention scores and values are counted over the full `context`, not its causal half, as in
    PaLM (arXiv 2204.02311, appendix B).
    """
    D, F, Dh = model.embed_dim, model.ffn_dim, model.head_dim
    attention = 2 * D * model.num_heads * Dh + 2 * D * model.num_kv_heads * Dh
    scores = 2 * context * model.num_heads * Dh
    up_layers = model.num_layers - model.num_stem_layers
    ffn = (2 * model.num_layers + up_layers) * D * F
    head = model.vocab_size * D
    return 2 * (model.num_layers * (attention + scores) + ffn + head)


def training_flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """Forward and backward: the backward pass has two matmuls for each of the forward's."""
    return 3 * forward_flops_per_token(model, seq_len)
