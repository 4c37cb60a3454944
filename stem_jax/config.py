"""The configuration: ConfigDict outside, frozen dataclasses inside, a closed world in between.

`configs/base.py` declares every key with its unit and default. `load_config` reads a config file,
applies overrides and builds the dataclasses once; a key that one side has and the other has not is
an error. Derived sizes (head_dim, the STEM layer indices) are resolved here and nowhere else.
"""

import ast
import dataclasses
import difflib
import json
import types
import typing
from pathlib import Path
from typing import Any

from stem_jax.config_checks import validate
from stem_jax.config_file import read_config_file
from stem_jax.errors import InputError
from stem_jax.storage import local_path

_STEM_PATTERNS = {
    "none": lambda n: (),
    "third": lambda n: tuple(range(1, n, 3)),
    "half": lambda n: tuple(range(1, n, 2)),
    "all_but_first": lambda n: tuple(range(1, n)),
    "all": lambda n: tuple(range(n)),
}

# Keys that texts written by earlier versions lack, with what held before they existed.
_ADDED = {
    "train.step_timeout": None,
    "train.compilation_cache": None,
    "train.init_from": None,
    "train.continue_from": None,
    "model.matmul_dtype": None,
    "train.profile_steps": "none",
    "model.rope_scaling": "none",
    "model.rope_factor": 1.0,
    "model.rope_original_len": None,
    "model.token_embedding_dropout": 0.0,
    "data.text_field": "text",
    "data.format": "auto",
}

# Keys that name files or folders; the sources of data are read by `data.sources.parse_sources`.
_PATHS = (
    "data.folder",
    "data.tokenizer_path",
    "train.init_from",
    "train.continue_from",
    "train.compilation_cache",
)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of the backbone. `stem_layers` is resolved to layer indices."""

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int | None
    ffn_dim: int
    stem_layers: str | tuple[int, ...]
    tie_embeddings: bool
    token_embedding_dropout: float
    norm_eps: float
    rope_theta: float
    rope_scaling: str
    rope_factor: float
    rope_original_len: int | None
    init_std_factor: str
    init_base_std: float | None
    param_dtype: str
    compute_dtype: str
    matmul_dtype: str | None
    attention: str
    remat: str
    scan_layers: bool

    def __post_init__(self):
        object.__setattr__(self, "stem_layers", _stem_layers(self.stem_layers, self.num_layers))
        if self.head_dim is None and self.num_heads > 0 and self.embed_dim % self.num_heads == 0:
            object.__setattr__(self, "head_dim", self.embed_dim // self.num_heads)

    @property
    def num_stem_layers(self) -> int:
        """S, the number of layers whose up values come from rows."""
        return len(self.stem_layers)


@dataclasses.dataclass(frozen=True)
class TablesConfig:
    """How the STEM tables are stored, sharded and updated."""

    optimizer: str
    param_dtype: str
    lr_multiplier: float
    weight_decay: float | None
    clip_norm: float
    init_std: float | None
    vocab_axes: tuple[str, ...]
    capacity: int | None
    pad_multiple: int
    resident_rows: int | None
    prefetch: int
    cache_policy: str


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    sources: str
    tokenizer: str
    tokenizer_path: str | None
    text_field: str
    format: str
    validation_fraction: float
    folder: str | None


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; at most one axis is -1 (all that the others leave)."""

    data: int
    fsdp: int
    tensor: int
    max_replicated_mib: float


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: float
    schedule: str
    schedule_steps: int | None
    warmup_steps: int
    min_lr_ratio: float
    decay_fraction: float
    cycle_length: float
    cosine_theta: float
    inv_sqrt_exponent: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    decay_mask: str
    clip_norm: float


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length and batching of a run."""

    steps: int
    global_batch_size: int
    micro_batches: int
    seq_len: int
    seed: int
    z_loss: float
    loss_chunk: int | None
    max_bad_steps: int
    log_every: int
    profile_steps: str
    step_timeout: float | None
    compilation_cache: str | None
    init_from: str | None
    continue_from: str | None
    sample_prompt: str
    sample_tokens: int


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Validation during and after training."""

    every: int
    max_batches: int | None
    baselines: bool


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: int
    keep: int


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. Build it with `load_config` or `build`."""

    model: ModelConfig
    tables: TablesConfig
    data: DataConfig
    mesh: MeshConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one micro-batch over all devices."""
        return self.train.global_batch_size // self.train.micro_batches

    @property
    def tokens_per_step(self) -> int:
        """Positions of one global batch."""
        return self.train.global_batch_size * self.train.seq_len

    @property
    def origins(self) -> dict[str, str]:
        """Folders of other runs that this one is to begin with, by key."""
        train = self.train
        keys = {"train.init_from": train.init_from, "train.continue_from": train.continue_from}
        return {key: folder for key, folder in keys.items() if folder is not None}

    @property
    def table_weight_decay(self) -> float:
        """Weight decay of the rows: their own, else the backbone's, as published."""
        own = self.tables.weight_decay
        return self.optimizer.weight_decay if own is None else own

    @property
    def table_init_std(self) -> float:
        """Standard deviation of the initial rows; Xavier-normal over [V, F] as published."""
        fan_sum = self.model.vocab_size + self.model.ffn_dim
        own = self.tables.init_std
        return (2.0 / fan_sum) ** 0.5 if own is None else own

    def to_json(self) -> str:
        """The resolved configuration as JSON, keys sorted; `from_json` reads it back."""
        raw = dataclasses.asdict(self)
        raw["model"]["stem_layers"] = self.model.stem_layers or "none"
        return json.dumps(raw, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """Builds a configuration from `to_json`'s text; raises InputError on unknown keys."""
        raw = json.loads(text)
        for key, value in _ADDED.items():
            section, name = key.split(".")
            raw.get(section, {}).setdefault(name, value)
        return build(raw)


def load_config(path: str | Path, overrides: dict[str, str] | None = None) -> Config:
    """Reads a config file (a Python file with `get_config()`), applies overrides and validates.

    Args:
        path: the file, as in `--config=configs/tiny.py`.
        overrides: {"section.key": text}, as in `--config.train.steps=5`.

    Raises:
        InputError: missing file, unknown key, wrong type, or sizes that do not fit together.
    """
    raw = read_config_file(Path(path))
    for key, text in (overrides or {}).items():
        section, _, name = key.partition(".")
        if section not in raw or name not in raw[section]:
            raise InputError(_unknown_key(key, [f"{s}.{k}" for s in raw for k in raw[s]]))
        declared = typing.get_type_hints(typing.get_type_hints(Config)[section])
        raw[section][name] = _parse_override(text, declared.get(name))
    config = build(raw)
    for key in _PATHS:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value is not None:
            local_path(value, key)
    return config


def build(raw: dict[str, dict[str, Any]]) -> Config:
    """Builds and validates the dataclasses from nested plain values."""
    sections = typing.get_type_hints(Config)
    _same_keys(raw, sections, prefix="")
    built = {}
    for section, cls in sections.items():
        hints = typing.get_type_hints(cls)
        _same_keys(raw[section], hints, prefix=f"{section}.")
        values = {
            name: _coerce(f"{section}.{name}", raw[section][name], hint)
            for name, hint in hints.items()
        }
        built[section] = cls(**values)
    model = built["model"]
    if raw["model"]["stem_layers"] != "none" and not model.stem_layers and model.num_layers > 0:
        raise InputError('model.stem_layers is empty; write "none" for a dense model')
    config = Config(**built)
    validate(config)
    return config


def _stem_layers(value: str | tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    if isinstance(value, str):
        if value in _STEM_PATTERNS:
            return _STEM_PATTERNS[value](num_layers)
        value = value.strip("()[] ")
        try:
            value = tuple(int(part) for part in value.split(",") if part.strip())
        except ValueError:
            raise InputError(
                f"model.stem_layers={value!r} is neither one of {', '.join(_STEM_PATTERNS)} nor "
                "comma-separated layer indices such as 1,3"
            ) from None
    return tuple(value)


def _unknown_key(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else "configs/base.py lists every key"
    return f"unknown config key {key}; {hint}"


def _same_keys(raw: dict, declared: dict, prefix: str) -> None:
    for key in raw:
        if key not in declared:
            raise InputError(_unknown_key(prefix + key, [prefix + name for name in declared]))
    for key in declared:
        if key not in raw:
            raise InputError(f"config key {prefix}{key} is missing; configs/base.py declares it")


def _parse_override(text: str, hint: Any) -> Any:
    """The value that a text on the command line stands for, as `_coerce` takes it."""
    # 2026_11 is the name of a folder and 1.10 a prompt, where a text is wanted.
    if hint == str | None and text.lower() == "none":
        return None
    if hint in (str, str | None):
        return text
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words and text != "none":
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _coerce(key: str, value: Any, hint: Any) -> Any:
    """Returns `value` as the declared type, or raises InputError naming the key and the type."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and (value is None or value == "none"):
        return None
    for option in options:
        if typing.get_origin(option) is tuple:
            item = typing.get_args(option)[0]
            if isinstance(value, str) and str not in options:
                value = tuple(part.strip() for part in value.strip("()[]").split(",") if part)
            if isinstance(value, int) and item is int and not isinstance(value, bool):
                value = (value,)
            if isinstance(value, list | tuple) and all(type(v) is item for v in value):
                return tuple(value)
        elif option is float and type(value) in (int, float):
            return float(value)
        elif type(value) is option:
            return value
        elif (
            option is str
            and type(value) in (int, float)
            and tuple not in map(typing.get_origin, options)
        ):
            # An override such as --config.train.sample_prompt=42 is a text all the same.
            return str(value)
    names = " or ".join(getattr(o, "__name__", str(o)).replace("NoneType", "none") for o in options)
    raise InputError(f"{key}={value!r} is a {type(value).__name__}; it must be {names}")
