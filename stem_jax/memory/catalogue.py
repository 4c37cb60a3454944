"""Which memories a configuration has, and the table of each.

A new one is a file with its keys, a section of the configuration, and an entry in each dict here.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stem_jax.config import TAKEN_KEYS, Config
from stem_jax.data.loader import KeysOf
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.data.word_tokens import word_ids
from stem_jax.errors import InputError
from stem_jax.memory.memory import INPUT_LAYER, STEM, Memory, prefix
from stem_jax.memory.ngram import EMBEDDING, NGRAM, NGramMemory
from stem_jax.memory.per_layer import PER_LAYER, PerLayerMemory
from stem_jax.memory.stem import StemMemory
from stem_jax.memory.value import VALUE, ValueMemory
from stem_jax.tables.layout import TableLayout
from stem_jax.tables.spec import FROZEN, TableSpec


def _stem(config: Config) -> Memory | None:
    model = config.model
    if not model.stem_layers:
        return None
    return StemMemory(model.vocab_size, model.ffn_dim, model.stem_layers)


def _value(config: Config) -> Memory | None:
    model, layers = config.model, config.value.layers
    if not layers:
        return None
    return ValueMemory(model.vocab_size, model.num_kv_heads * model.head_dim, layers)


def _per_layer(config: Config) -> Memory | None:
    own = config.per_layer
    if not own.layers:
        return None
    return PerLayerMemory(config.model.vocab_size, own.width, own.layers)


def _ngram(config: Config) -> Memory | None:
    own, model = config.ngram, config.model
    if not own.layers:
        return None
    layers = own.layers
    if own.reader == EMBEDDING:
        if layers != (0,):
            raise InputError(
                f"ngram.layers={layers} with ngram.reader={EMBEDDING}, which reads before the "
                "first layer alone; set it to 0"
            )
        layers = (INPUT_LAYER,)
    values = model.num_kv_heads * model.head_dim
    if own.reader == VALUE and own.width != values:
        raise InputError(
            f"ngram.width={own.width} with ngram.reader={VALUE}, whose rows are as wide as the "
            f"values of all KV heads; set it to {values}"
        )
    return NGramMemory(
        model.vocab_size,
        layers,
        own.max_order,
        own.heads,
        own.keys_per_head,
        own.width,
        own.seed,
        own.eos_id,
        reader=own.reader,
    )


# All that a model may have; None of those that a configuration has not.
_MEMORIES: dict[str, Callable[[Config], Memory | None]] = {
    STEM: _stem,
    VALUE: _value,
    PER_LAYER: _per_layer,
    NGRAM: _ngram,
}
MEMORIES = tuple(_MEMORIES)

# Standard deviation of the first rows, where the configuration says none.
_INIT_STD: dict[str, Callable[[Config], float]] = {
    STEM: lambda config: config.table_init_std,
    # As nanochat's, which are uniform.
    VALUE: lambda config: config.model.embed_dim**-0.5,
    # sqrt(P) times a row is then as large as the normed embedding that it is added to.
    PER_LAYER: lambda config: config.per_layer.width**-0.5,
    # As the configurations of transformers' qwen4_exp.
    NGRAM: lambda config: 0.02,
}
# See `TableSpec.size_keys`, and `width_rule`.
_SIZE_KEYS = {
    VALUE: ("model.head_dim", "model.num_kv_heads", "value.layers", "model.vocab_size"),
    PER_LAYER: ("per_layer.width", "per_layer.layers", "model.vocab_size"),
    NGRAM: ("ngram.width", "ngram.keys_per_head", "ngram.layers"),
}
_WIDTH_RULES = {
    VALUE: "model.num_kv_heads * model.head_dim",
    PER_LAYER: "per_layer.width",
    NGRAM: "ngram.width / ((ngram.max_order - 1) * ngram.heads)",
}


def memories(config: Config) -> dict[str, Memory]:
    """The memories of a model by name; none for a dense model.

    Raises:
        InputError: sizes of a memory that do not fit together.
    """
    made = {name: make(config) for name, make in _MEMORIES.items()}
    return {name: memory for name, memory in made.items() if memory is not None}


def with_eos(config: Config, eos_id: int | None) -> Config:
    """The configuration of a run whose tokenizer ends documents with this token, if it says none.

    None leaves it open.
    """
    if not config.ngram.layers or config.ngram.eos_id is not None:
        return config
    return dataclasses.replace(config, ngram=dataclasses.replace(config.ngram, eos_id=eos_id))


def with_trained_tokens(config: Config, tokenizer: Tokenizer) -> Config:
    """The configuration of a run with this tokenizer, token ids for `tables.trained_words`.

    Raises:
        InputError: a word that has no tokens, or an id that the model has not.
    """
    words = config.tables.trained_words
    if words is None:
        return config
    if isinstance(words, str):
        ids = {token for word in words.split(",") for token in word_ids(tokenizer, word)}
        words = tuple(sorted(ids))
    if not words or min(words) < 0 or max(words) >= config.model.vocab_size:
        raise InputError(
            f"tables.trained_words={words} must be ids below model.vocab_size="
            f"{config.model.vocab_size}, or words; change it, or set it to none"
        )
    return dataclasses.replace(
        config, tables=dataclasses.replace(config.tables, trained_words=words)
    )


def keys_on_the_host(memories: Mapping[str, Memory]) -> KeysOf | None:
    """Gives the keys of memories that depend on several tokens, for batches as they are loaded."""
    reaching = {name: memory for name, memory in memories.items() if memory.reach}
    if not reaching:
        return None
    return lambda tokens, segments: {
        name: memory.keys(tokens, segments) for name, memory in reaching.items()
    }


def table_specs(config: Config) -> dict[str, TableSpec]:
    """The table of each memory."""
    return {name: _table_spec(memory, config) for name, memory in memories(config).items()}


def init_std(config: Config, name: str) -> float:
    """Standard deviation of a memory's first rows."""
    own = getattr(config, name, config.tables).init_std
    return _INIT_STD[name](config) if own is None else own


def read_row_format(config: Config, spec: TableSpec) -> str:
    """The dtype of rows that are only read, which hold all updates: as exact as a model asks for.

    What is rounded to the nearest for the model anyway needs no more room than in training.
    """
    return spec.row_format if config.model.compute_dtype == spec.row_format else "float32"


def _table_spec(memory: Memory, config: Config) -> TableSpec:
    tables, optimizer, name = config.tables, config.optimizer, memory.name
    # STEM's has the section `tables`.
    own = getattr(config, name, None)
    trains = optimizer.trains_tables

    def chosen(key: str):
        return config.resolved(TAKEN_KEYS[key] if own is None else f"{name}.{key}")

    # Keys of several tokens are hashes: spread over all numbers as they are.
    layout = TableLayout(memory.num_keys, tables.pad_multiple, spread=memory.reach > 0)
    of_rows = tables if own is None else own
    resident, in_memory = of_rows.resident_rows, of_rows.host_rows
    words = tables.trained_words
    # Words have tokens once the tokenizer is known: until then it matters to nobody which.
    trained_keys = words if isinstance(words, tuple) else None
    # What refusals call it.
    named: dict[str, Any] = {}
    if own is not None:
        named = {
            "section": name,
            "size_keys": _SIZE_KEYS[name],
            "width_rule": _WIDTH_RULES[name],
        }
    return TableSpec(
        layout=layout,
        vectors=memory.vectors,
        width=memory.width,
        init_std=init_std(config, name),
        vocab_axes=tables.vocab_axes,
        optimizer=tables.optimizer if trains else FROZEN,
        lr_multiplier=chosen("lr_multiplier"),
        weight_decay=chosen("weight_decay") if trains else 0.0,
        beta1=chosen("beta1"),
        beta2=chosen("beta2"),
        epsilon=optimizer.epsilon,
        clip_norm=chosen("clip_norm"),
        capacity=tables.capacity,
        resident_rows=resident if resident and resident < layout.num_rows else None,
        host_rows=in_memory if in_memory and in_memory < layout.num_rows else None,
        disk=tables.disk and str(Path(tables.disk) / prefix(name)),
        row_format=chosen("row_format"),
        moments=chosen("moments"),
        rounding_seed=zlib.crc32(f"{name} {config.train.seed}".encode()),
        trained_keys=trained_keys,
        **named,
    )
