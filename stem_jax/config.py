"""The configuration: ConfigDict outside, frozen dataclasses inside, a closed world in between.

`configs/base.py` declares every key with its unit and default, the dataclasses its type and what
changing it means (`config_keys`). Values are resolved: `config_file` makes them of what is written.
"""

import dataclasses
import functools
import json
import typing
from typing import Any

from stem_jax.config_keys import NOTHING, Key, Role, key
from stem_jax.config_memories import (
    LAYERS,
    MEMORY_SECTIONS,
    TAKEN_KEYS,
    NGramConfig,
    PerLayerConfig,
    ValueConfig,
)
from stem_jax.lora_targets import LORA_TARGETS


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of the backbone. stem_layers: their indices."""

    vocab_size: int = key(Role.SHAPE)
    embed_dim: int = key(Role.SHAPE)
    num_layers: int = key(Role.SHAPE)
    num_heads: int = key(Role.SHAPE)
    num_kv_heads: int = key(Role.SHAPE)
    head_dim: int = key(Role.SHAPE, written=int | None)
    ffn_dim: int = key(Role.SHAPE)
    stem_layers: tuple[int, ...] = key(Role.SHAPE, written=LAYERS, layers=True, kind="stem")
    stem_site: str = key(Role.SHAPE, before="up", of_kind="stem")
    hash_moe_layers: tuple[int, ...] = key(
        Role.SHAPE, written=LAYERS, layers=True, before=(), kind="hash_moe"
    )
    hash_moe_experts: int = key(Role.SHAPE, before=16, of_kind="hash_moe")
    tie_embeddings: bool = key(Role.SHAPE)
    token_embedding_dropout: float = key(Role.SHAPE, before=0.0)
    norm_eps: float = key(Role.FIXED)
    rope_theta: float = key(Role.CONTINUED)
    rope_scaling: str = key(Role.CONTINUED, before="none")
    rope_factor: float = key(Role.CONTINUED, before=1.0)
    rope_original_len: int | None = key(Role.CONTINUED, before=None)
    init_std_factor: str = key(Role.CONTINUED)
    init_base_std: float | None = key(Role.CONTINUED)
    param_dtype: str = key(Role.CONTINUED)
    compute_dtype: str = key(Role.CONTINUED)
    matmul_dtype: str | None = key(Role.CONTINUED, before=None)
    attention: str = key(Role.HARMLESS)
    remat: str = key(Role.HARMLESS)
    scan_layers: bool = key(Role.HARMLESS)

    @property
    def listed_layers(self) -> dict[str, tuple[int, ...]]:
        """Of each kind of layer that a key lists, its layers; the others are dense."""
        return {kind: getattr(self, field) for kind, field in layer_fields().items()}

    def is_as_before(self, field: str) -> bool:
        """Whether a field is what held before there was one; not, if there always was."""
        return before(field) is not NOTHING and getattr(self, field) == before(field)

    @property
    def num_stem_layers(self) -> int:
        """S, the number of layers whose up values come from rows."""
        return len(self.stem_layers)


@dataclasses.dataclass(frozen=True)
class TablesConfig:
    """How the STEM tables are stored, sharded and updated.

    trained_words: token ids, once the run's tokenizer is known.
    """

    optimizer: str = key(Role.FIXED)
    row_format: str = key(Role.FIXED, formerly="tables.param_dtype")
    moments: str = key(Role.FIXED, before="adamw")
    lr_multiplier: float = key(Role.FIXED)
    weight_decay: float | None = key(Role.FIXED)
    clip_norm: float = key(Role.CONTINUED)
    init_std: float | None = key(Role.CONTINUED)
    vocab_axes: tuple[str, ...] = key(Role.HARMLESS)
    capacity: int | None = key(Role.HARMLESS)
    pad_multiple: int = key(Role.SHAPE)
    resident_rows: int | None = key(Role.HARMLESS)
    host_rows: int | None = key(Role.HARMLESS, before=None)
    disk: str | None = key(Role.HARMLESS, before=None, path=True)
    prefetch: int = key(Role.HARMLESS)
    cache_policy: str = key(Role.HARMLESS)
    trained_words: str | tuple[int, ...] | None = key(Role.FIXED, before=None)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters of low rank beside frozen projections; rank 0: none."""

    rank: int = key(Role.SHAPE, before=0)
    alpha: float = key(Role.SHAPE, before=16.0)
    targets: tuple[str, ...] = key(Role.SHAPE, before=tuple(LORA_TARGETS))

    @property
    def scale(self) -> float:
        """What an adapter's product is multiplied by."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    sources: str = key(Role.CONTINUED)
    tokenizer: str = key(Role.CONTINUED)
    tokenizer_path: str | None = key(Role.CONTINUED, path=True, hub=True)
    text_field: str = key(Role.CONTINUED, before="text")
    format: str = key(Role.CONTINUED, before="auto")
    packing: str = key(Role.CONTINUED, before="cut")
    validation_fraction: float = key(Role.CONTINUED)
    folder: str | None = key(Role.HARMLESS, path=True)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; at most one axis is -1 (all that the others leave)."""

    data: int = key(Role.HARMLESS)
    fsdp: int = key(Role.HARMLESS)
    context: int = key(Role.HARMLESS, before=1)
    tensor: int = key(Role.HARMLESS)
    max_replicated_mib: float = key(Role.HARMLESS)

    def on_one_device(self) -> "MeshConfig":
        """The same for a program of a single device."""
        return dataclasses.replace(self, data=1, fsdp=1, context=1, tensor=1)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The backbone's optimizer, its learning-rate schedule, and what of the model trains."""

    name: str = key(Role.FIXED, before="adamw")
    train: str = key(Role.FIXED, before="all")
    learning_rate: float = key(Role.SCHEDULE)
    schedule: str = key(Role.SCHEDULE)
    schedule_steps: int | None = key(Role.SCHEDULE)
    warmup_steps: int = key(Role.SCHEDULE)
    min_lr_ratio: float = key(Role.SCHEDULE)
    decay_fraction: float = key(Role.SCHEDULE)
    cycle_length: float = key(Role.SCHEDULE)
    cosine_theta: float = key(Role.SCHEDULE)
    inv_sqrt_exponent: float = key(Role.SCHEDULE)
    beta1: float = key(Role.FIXED)
    beta2: float = key(Role.FIXED)
    epsilon: float = key(Role.FIXED)
    weight_decay: float = key(Role.FIXED)
    decay_mask: str = key(Role.FIXED)
    clip_norm: float = key(Role.CONTINUED)

    @property
    def trains_backbone(self) -> bool:
        """Whether steps change the parameters beside the tables."""
        return self.train != "tables"

    @property
    def trains_tables(self) -> bool:
        """Whether steps change the rows of the tables, if there are any."""
        return self.train != "backbone"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length and batching of a run."""

    steps: int = key(Role.SCHEDULE)
    global_batch_size: int = key(Role.CONTINUED)
    micro_batches: int = key(Role.HARMLESS)
    seq_len: int = key(Role.CONTINUED)
    seed: int = key(Role.CONTINUED)
    init: str = key(Role.START, before="count")
    z_loss: float = key(Role.CONTINUED)
    loss_chunk: int | None = key(Role.HARMLESS)
    max_bad_steps: int = key(Role.HARMLESS)
    log_every: int = key(Role.HARMLESS)
    profile_steps: str = key(Role.HARMLESS, before="none")
    step_timeout: float | None = key(Role.HARMLESS, before=None)
    upload_every: float | None = key(Role.HARMLESS, before=60.0)
    compilation_cache: str | None = key(Role.HARMLESS, before=None, path=True)
    init_from: str | None = key(Role.START, before=None, run=True)
    continue_from: str | None = key(Role.START, before=None, run=True)
    sample_prompt: str = key(Role.HARMLESS)
    sample_tokens: int = key(Role.HARMLESS)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Validation during and after training."""

    every: int = key(Role.HARMLESS)
    max_batches: int | None = key(Role.HARMLESS)
    baselines: bool = key(Role.HARMLESS)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: int = key(Role.HARMLESS)
    keep: int = key(Role.HARMLESS)
    verify: bool = key(Role.HARMLESS, before=True)
    full_every: int = key(Role.HARMLESS, before=1)


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Where a run is shown beside its folder, and as what."""

    trackers: tuple[str, ...] | None = key(Role.HARMLESS, before=("tensorboard",))
    project: str = key(Role.HARMLESS, before="stem_jax")
    name: str | None = key(Role.HARMLESS, before=None)
    offline: bool = key(Role.HARMLESS, before=False)
    mlflow_uri: str | None = key(Role.HARMLESS, before=None)
    timeout: float = key(Role.HARMLESS, before=30.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. Build it with `load_config` or `build`."""

    model: ModelConfig
    tables: TablesConfig
    value: ValueConfig
    per_layer: PerLayerConfig
    ngram: NGramConfig
    lora: LoraConfig
    data: DataConfig
    mesh: MeshConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    tracking: TrackingConfig

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one micro-batch over all devices."""
        return self.train.global_batch_size // self.train.micro_batches

    @property
    def tokens_per_step(self) -> int:
        """Positions of one global batch."""
        return self.train.global_batch_size * self.train.seq_len

    @property
    def offloads(self) -> bool:
        """Whether rows of some memory may lie in host memory."""
        sections = ("tables", *MEMORY_SECTIONS)
        return any(self.value_of(f"{name}.resident_rows") is not None for name in sections)

    @property
    def origins(self) -> dict[str, str]:
        """Folders of other runs that this one is to begin with, by key."""
        train = self.train
        keys = {"train.init_from": train.init_from, "train.continue_from": train.continue_from}
        return {key: folder for key, folder in keys.items() if folder is not None}

    @property
    def table_weight_decay(self) -> float:
        """Weight decay of the rows: their own, else the backbone's, as published."""
        return self.resolved("tables.weight_decay")

    @property
    def table_init_std(self) -> float:
        """Standard deviation of the initial rows; Xavier-normal over [V, F] as published."""
        fan_sum = self.model.vocab_size + self.model.ffn_dim
        own = self.tables.init_std
        return (2.0 / fan_sum) ** 0.5 if own is None else own

    def value_of(self, name: str) -> Any:
        """The value of a key "section.name"."""
        section, _, field = name.partition(".")
        return getattr(getattr(self, section), field)

    def taken_key(self, name: str) -> str:
        """The key whose value a key has: another where it is None and takes one, else its own."""
        section, _, field = name.partition(".")
        if self.value_of(name) is not None:
            return name
        if name == "tables.weight_decay":
            return "optimizer.weight_decay"
        if section in MEMORY_SECTIONS and field in TAKEN_KEYS:
            return self.taken_key(TAKEN_KEYS[field])
        return name

    def resolved(self, name: str) -> Any:
        """The value that a key has or takes."""
        return self.value_of(self.taken_key(name))

    def to_json(self) -> str:
        """As JSON, keys sorted; `config_file.config_from_json` reads it back."""
        raw = dataclasses.asdict(self)
        for name in layer_keys():
            section, _, field = name.partition(".")
            raw[section][field] = self.value_of(name) or "none"
        return json.dumps(raw, indent=2, sort_keys=True) + "\n"


@functools.cache
def _section_keys(cls: type) -> dict[str, Key]:
    return {field.name: field.metadata["key"] for field in dataclasses.fields(cls)}


@functools.cache
def declared_keys() -> dict[str, Key]:
    """All keys, "section.name", in their order."""
    return {
        f"{section}.{field}": key
        for section, cls in typing.get_type_hints(Config).items()
        for field, key in _section_keys(cls).items()
    }


def model_keys() -> dict[str, Key]:
    """Those of the model section, by field."""
    return _section_keys(ModelConfig)


def before(field: str) -> Any:
    """What held before there was this field of the model section; NOTHING: there always was."""
    return model_keys()[field].before


@functools.cache
def layer_fields() -> dict[str, str]:
    """Of each kind of layer that a key of the model section lists, that key's field."""
    return {key.kind: field for field, key in model_keys().items() if key.kind is not None}


def layer_keys() -> list[str]:
    """The keys that list layers, of a kind or that read a memory."""
    return [name for name, key in declared_keys().items() if key.layers]


def layer_lists() -> list[str]:
    """The keys that list the layers of a kind."""
    return [f"model.{field}" for field in layer_fields().values()]


def keys_of(*roles: Role) -> list[str]:
    """The keys of these roles, in their order."""
    return [name for name, key in declared_keys().items() if key.role in roles]


def differing_keys(one: Config, other: Config) -> list[str]:
    """Keys whose values differ."""
    return [name for name in declared_keys() if one.value_of(name) != other.value_of(name)]
