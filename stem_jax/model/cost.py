"""Parameters, FLOPs and reads of a configuration. Table lookups are no FLOPs and not counted."""

import dataclasses

import jax.numpy as jnp

from stem_jax.config import Config, ModelConfig
from stem_jax.memory.catalogue import read_row_format, table_specs
from stem_jax.memory.memory import INPUT_LAYER
from stem_jax.model.feed_forward import kinds_of
from stem_jax.model.kind import LayerCost
from stem_jax.model.lora import adapter_weights
from stem_jax.model.readers import READERS
from stem_jax.model.row_reads import RowReads, row_reads


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters.

    active: of the backbone those that a token uses. table: all rows of all layers that read them.
    per_token: active and one row, what one token touches. idle: of the backbone those that only
    other tokens use.
    """

    active: int
    table: int
    per_token: int
    idle: int = 0

    @property
    def total(self) -> int:
        """Everything that is trained and stored."""
        return self.active + self.idle + self.table


@dataclasses.dataclass(frozen=True)
class PassFlops:
    """FLOPs of one forward pass of one sequence.

    matmul: two for each product of a sum. elementwise: one for each number that norms, rotary
    positions, softmax, gate and residuals compute or add up; exp, sin, cos and square roots, which
    XLA counts apart, are not among them.
    """

    matmul: int
    elementwise: int


@dataclasses.dataclass(frozen=True)
class DecodeReads:
    """Numbers that decoding one token reads, a batch of one sequence.

    backbone: parameters that the token uses; of an embedding that is not the head one vector. row:
    of the tables.
    cache: keys and values of all slots. bytes: of them all, as they are stored.
    """

    backbone: int
    row: int
    cache: int
    bytes: int


def count_parameters(config: Config) -> ParameterCount:
    """Counts from the shapes alone."""
    model, layers, reads = config.model, _layers(config), row_reads(config)
    D = model.embed_dim
    norms = (2 * model.num_layers + 1) * D
    embeddings = (1 if model.tie_embeddings else 2) * model.vocab_size * D
    dropped = D if model.token_embedding_dropout > 0 else 0
    others = model.num_layers * _attention_weights(model) + norms + embeddings + dropped
    active = others + layers.reads + adapter_weights(config)
    table = sum(m.num_keys * m.vectors * m.width for m in reads.memories.values())
    rows = sum(_row_numbers(reads, name) for name in reads.memories)
    return ParameterCount(active, table, active + rows, layers.parameters - layers.reads)


def _attention_weights(model: ModelConfig) -> int:
    """Of a layer; a token multiplies with each once."""
    D, Dh = model.embed_dim, model.head_dim
    return 2 * D * model.num_heads * Dh + 2 * D * model.num_kv_heads * Dh


def _layers(config: Config) -> LayerCost:
    """The feed-forward parts and readers of all layers together."""
    costs = [kind.cost(config.model) for kind in kinds_of(config.model)]
    reads = row_reads(config)
    for layer in (INPUT_LAYER, *range(config.model.num_layers)):
        costs += [
            READERS[read.reader].cost_of(config, reads.memories[read.memory])
            for read in reads.of(layer)
            if read.reader is not None
        ]
    return LayerCost(*map(sum, zip(*map(dataclasses.astuple, costs), strict=True)))


def _row_numbers(reads: RowReads, name: str) -> int:
    """Numbers of a token's rows of a memory; whole rows come, whichever vectors are read."""
    memory = reads.memories[name]
    return reads.keys_of_a_token(name) * memory.vectors * memory.width


def forward_flops_per_token(config: Config, context: int) -> int:
    """Matmul FLOPs of one token's forward pass, head included.

    Attention scores and values are counted over the full `context`, not its causal half, as in
    PaLM (arXiv 2204.02311, appendix B).
    """
    return _block_matmuls(config, context) + _head_matmul(config.model)


def projection_flops_per_token(config: Config) -> int:
    """Of those, what the blocks' projections multiply: all but attention and head."""
    return _block_matmuls(config, 0)


def training_flops_per_token(config: Config, seq_len: int) -> int:
    """Forward and backward: the backward pass has two matmuls for each of the forward's."""
    return 3 * forward_flops_per_token(config, seq_len)


def generation_flops(config: Config, length: int, slots: int) -> PassFlops:
    """What `Generator.advance` computes for one sequence.

    Args:
        length: tokens read at once: of the prompt in a prefill, 1 in a decode step.
        slots: that each query meets, also those that are masked or empty: the tokens themselves
            in a prefill, those of the cache in a decode step.

    The head sees the last token alone.
    """
    matmul = length * _block_matmuls(config, slots) + _head_matmul(config.model)
    return PassFlops(matmul, length * _elementwise(config, slots))


def decode_reads(config: Config, slots: int) -> DecodeReads:
    """What a decode step with a cache of `slots` reads."""
    model, count = config.model, count_parameters(config)
    dropped = model.embed_dim if model.token_embedding_dropout > 0 else 0
    # Of an embedding of its own one vector is read; a tied one is the head too, and read whole.
    other_vectors = 0 if model.tie_embeddings else (model.vocab_size - 1) * model.embed_dim
    backbone = count.active - dropped - other_vectors
    row = count.per_token - count.active
    cache = 2 * model.num_layers * model.num_kv_heads * model.head_dim * slots
    parameter_bytes = jnp.dtype(model.param_dtype).itemsize
    cache_bytes = jnp.dtype(model.compute_dtype).itemsize
    reads, specs = row_reads(config), table_specs(config)
    row_bytes = sum(
        _row_numbers(reads, name) * jnp.dtype(read_row_format(config, spec)).itemsize
        for name, spec in specs.items()
    )
    size = backbone * parameter_bytes + row_bytes + cache * cache_bytes
    return DecodeReads(backbone, row, cache, size)


def _block_matmuls(config: Config, context: int) -> int:
    """Matmul FLOPs of a token in all blocks, attending over `context` positions."""
    model = config.model
    scores = 2 * context * model.num_heads * model.head_dim
    attention = model.num_layers * (_attention_weights(model) + scores)
    return 2 * (attention + _layers(config).matmuls + adapter_weights(config))


def _head_matmul(model: ModelConfig) -> int:
    return 2 * model.vocab_size * model.embed_dim


def _elementwise(config: Config, slots: int) -> int:
    """Elementwise FLOPs of a token, operation by operation as the modules write them."""
    model = config.model
    D, H, Dh = model.embed_dim, model.num_heads, model.head_dim
    norm = 4 * D  # square, sum, times 1 / rms, times scale
    rotary = 3 * (H + model.num_kv_heads) * Dh  # four products and two sums a pair
    softmax = 6 * H * slots  # scale, mask, maximum, difference, sum, quotient
    residuals = 2 * D
    block = 2 * norm + rotary + softmax + residuals
    return model.num_layers * block + _layers(config).elementwise + norm
