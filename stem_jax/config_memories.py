"""The sections of the configuration of memories beside STEM's, whose table has `tables`."""

import dataclasses

from stem_jax.config_keys import Role, key

# A pattern, or indices.
LAYERS = str | tuple[int, ...]
# They have the memories' names.
MEMORY_SECTIONS = ("value", "per_layer", "ngram")
# The keys whose values theirs take where they are None; STEM has these alone.
TAKEN_KEYS = {
    "lr_multiplier": "tables.lr_multiplier",
    "weight_decay": "tables.weight_decay",
    "beta1": "optimizer.beta1",
    "beta2": "optimizer.beta2",
    "clip_norm": "tables.clip_norm",
    "row_format": "tables.row_format",
    "moments": "tables.moments",
}


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """What a memory beside STEM's has of its own. layers: that read it; none: there is no such.

    None takes the value of the same key of `tables`, betas that of `optimizer`; of resident_rows
    and host_rows it means all.
    """

    layers: tuple[int, ...] = key(Role.SHAPE, written=LAYERS, layers=True, before=())
    lr_multiplier: float | None = key(Role.FIXED, before=None)
    weight_decay: float | None = key(Role.FIXED, before=None)
    beta1: float | None = key(Role.FIXED, before=None)
    beta2: float | None = key(Role.FIXED, before=None)
    clip_norm: float | None = key(Role.CONTINUED, before=None)
    init_std: float | None = key(Role.CONTINUED, before=None)
    row_format: str | None = key(Role.FIXED, before=None)
    moments: str | None = key(Role.FIXED, before=None)
    resident_rows: int | None = key(Role.HARMLESS, before=None)
    host_rows: int | None = key(Role.HARMLESS, before=None)


@dataclasses.dataclass(frozen=True)
class ValueConfig(MemoryConfig):
    """Value embeddings."""


@dataclasses.dataclass(frozen=True)
class PerLayerConfig(MemoryConfig):
    """Per-layer embeddings."""

    width: int = key(Role.SHAPE, before=256)


@dataclasses.dataclass(frozen=True)
class NGramConfig(MemoryConfig):
    """Hashed n-grams. eos_id: None until the run's tokenizer is known."""

    reader: str = key(Role.SHAPE, before="engram")
    max_order: int = key(Role.SHAPE, before=3)
    heads: int = key(Role.SHAPE, before=8)
    keys_per_head: int = key(Role.SHAPE, before=2**20)
    width: int = key(Role.SHAPE, before=1024)
    seed: int = key(Role.SHAPE, before=0)
    eos_id: int | None = key(Role.SHAPE, before=None)
