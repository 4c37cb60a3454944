"""Which memories a configuration has, and the table of each."""

import zlib

from stem_jax.config import Config
from stem_jax.memory.memory import STEM, Memory
from stem_jax.memory.stem import StemMemory
from stem_jax.tables.layout import TableLayout
from stem_jax.tables.spec import FROZEN, TableSpec

# All that a model may have.
MEMORIES = (STEM,)


def memories(config: Config) -> dict[str, Memory]:
    """The memories of a model by name; none for a dense model."""
    found: dict[str, Memory] = {}
    model = config.model
    if model.stem_layers:
        found[STEM] = StemMemory(model.vocab_size, model.ffn_dim, model.stem_layers)
    return found


def table_specs(config: Config) -> dict[str, TableSpec]:
    """The table of each memory."""
    return {name: _table_spec(memory, config) for name, memory in memories(config).items()}


def read_row_format(config: Config) -> str:
    """The dtype of rows that are only read, which hold all updates: as exact as a model asks for.

    What is rounded to the nearest for the model anyway needs no more room than in training.
    """
    row_format = config.tables.row_format
    return row_format if config.model.compute_dtype == row_format else "float32"


def _table_spec(memory: Memory, config: Config) -> TableSpec:
    tables, trains = config.tables, config.optimizer.trains_tables
    layout = TableLayout(memory.num_keys, tables.pad_multiple)
    resident = tables.resident_rows
    return TableSpec(
        layout=layout,
        vectors=memory.vectors,
        width=memory.width,
        init_std=config.table_init_std,
        vocab_axes=tables.vocab_axes,
        optimizer=tables.optimizer if trains else FROZEN,
        lr_multiplier=tables.lr_multiplier,
        weight_decay=config.table_weight_decay if trains else 0.0,
        beta1=config.optimizer.beta1,
        beta2=config.optimizer.beta2,
        epsilon=config.optimizer.epsilon,
        clip_norm=tables.clip_norm,
        capacity=tables.capacity,
        resident_rows=resident if resident and resident < layout.num_rows else None,
        row_format=tables.row_format,
        moments=tables.moments,
        rounding_seed=zlib.crc32(f"{memory.name} {config.train.seed}".encode()),
    )
