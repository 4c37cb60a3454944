"""Cross-field checks of a configuration: everything that can be refused before a device is touched.

Each check names the value, the field and the remedy.
"""

import math

from stem_jax.config import (
    MEMORY_SECTIONS,
    TAKEN_KEYS,
    Config,
    layer_keys,
    layer_lists,
)
from stem_jax.errors import InputError
from stem_jax.lora_targets import LORA_TARGETS

_CHOICES = {
    "model.stem_site": ("up", "gate", "up_add"),
    "model.init_std_factor": ("disabled", "current_depth", "global_depth", "dim_ratio"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.matmul_dtype": (None, "float8"),
    "model.attention": ("auto", "xla", "chunked", "cudnn", "tokamax", "splash"),
    "model.rope_scaling": ("none", "llama3", "yarn"),
    "model.remat": ("none", "full", "attention", "dots", "offload"),
    "ngram.reader": ("engram", "embedding", "value"),
    "tables.cache_policy": ("lfu", "lru"),
    "tables.optimizer": ("deferred_adamw", "lazy_adamw", "dense_adamw"),
    "tables.row_format": ("float32", "bfloat16"),
    "tables.moments": ("adamw", "rowwise"),
    "data.tokenizer": ("sentencepiece", "hf", "bytes"),
    "data.format": ("auto", "text", "jsonl", "json", "parquet"),
    "data.packing": ("cut", "whole"),
    "optimizer.name": ("adamw", "muon"),
    "optimizer.train": ("all", "tables", "backbone"),
    "optimizer.schedule": ("constant", "linear", "inv_sqrt", "cosine", "wsd"),
    "optimizer.decay_mask": ("all", "matrices"),
    "train.init": ("count", "name"),
}
_AT_LEAST_ONE = [
    "model.vocab_size",
    "model.embed_dim",
    "model.num_layers",
    "model.num_heads",
    "model.num_kv_heads",
    "model.ffn_dim",
    "model.hash_moe_experts",
    "per_layer.width",
    "ngram.heads",
    "ngram.keys_per_head",
    "ngram.width",
    "tables.pad_multiple",
    "train.steps",
    "train.global_batch_size",
    "train.micro_batches",
    "train.seq_len",
    "train.max_bad_steps",
    "train.log_every",
    "checkpoint.keep",
]
_NOT_NEGATIVE = [
    "optimizer.weight_decay",
    "optimizer.warmup_steps",
    "optimizer.min_lr_ratio",
    "train.seed",
    "train.z_loss",
    "train.sample_tokens",
    "eval.every",
    "checkpoint.every",
    "checkpoint.full_every",
    "mesh.max_replicated_mib",
]
_POSITIVE = [
    "model.norm_eps",
    "model.rope_theta",
    "tables.lr_multiplier",
    "tables.clip_norm",
    "optimizer.learning_rate",
    "optimizer.epsilon",
    "optimizer.clip_norm",
    "optimizer.cycle_length",
    "optimizer.cosine_theta",
    "optimizer.inv_sqrt_exponent",
    "tracking.timeout",
]
_OPTIONAL_POSITIVE = [
    "tables.init_std",
    "tables.capacity",
    "tables.resident_rows",
    "tables.host_rows",
    "optimizer.schedule_steps",
    "eval.max_batches",
    "train.loss_chunk",
    "train.step_timeout",
    "train.upload_every",
    "model.init_base_std",
    "model.rope_original_len",
]


def validate(config: Config) -> None:
    """Raises InputError for the first value that cannot work; returns nothing otherwise."""
    for key, allowed in _CHOICES.items():
        if (value := config.value_of(key)) not in allowed:
            raise InputError(
                f"{key}={value!r} is unknown; choose one of {', '.join(map(_word, allowed))}"
            )
    _check_range(config, _AT_LEAST_ONE, lambda v: v >= 1, "at least 1")
    _check_range(config, _NOT_NEGATIVE, lambda v: v >= 0, "0 or more")
    _check_range(config, _POSITIVE, lambda v: 0 < v < math.inf, "more than 0")
    _check_range(config, _OPTIONAL_POSITIVE, lambda v: v is None or v > 0, "more than 0, or none")
    _check_range(config, ["model.rope_factor"], lambda v: 1 <= v < math.inf, "at least 1")
    _check_range(config, ["ngram.max_order"], lambda v: v >= 2, "at least 2")
    _check_range(config, ["ngram.eos_id"], lambda v: v is None or v >= 0, "0 or more, or none")
    _check_range(config, ["lora.rank"], lambda v: v >= 0, "0 or more")
    _check_range(config, ["lora.alpha"], lambda v: 0 < v < math.inf, "more than 0")
    _check_range(config, ["tables.prefetch"], lambda v: 0 <= v <= 16, "0 to 16")
    _check_range(
        config, ["tables.weight_decay"], lambda v: v is None or v >= 0, "0 or more, or none"
    )
    _check_memories(config)
    _check_model(config)
    _check_optimizer(config)
    _check_tables(config)
    _check_lora(config)
    _check_batch(config)


def _word(choice: str | None) -> str:
    return "none" if choice is None else choice


def _check_range(config: Config, keys: list[str], accepts, rule: str) -> None:
    for key in keys:
        if not accepts(value := config.value_of(key)):
            raise InputError(f"{key}={value} must be {rule}")


# Of each section of a memory beside STEM's; None takes another key's value, which is checked there.
_OF_MEMORIES = {
    "lr_multiplier": (lambda v: v > 0, "more than 0"),
    "weight_decay": (lambda v: v >= 0, "0 or more"),
    "beta1": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "beta2": (lambda v: 0 <= v < 1, "in [0, 1)"),
    "clip_norm": (lambda v: v > 0, "more than 0"),
    "init_std": (lambda v: v > 0, "more than 0"),
    "row_format": (lambda v: v in _CHOICES["tables.row_format"], "float32 or bfloat16"),
    "moments": (lambda v: v in _CHOICES["tables.moments"], "adamw or rowwise"),
    "resident_rows": (lambda v: v > 0, "more than 0"),
    "host_rows": (lambda v: v > 0, "more than 0"),
}


def _check_memories(config: Config) -> None:
    for section in MEMORY_SECTIONS:
        own = getattr(config, section)
        for field, (accepts, rule) in _OF_MEMORIES.items():
            value = getattr(own, field)
            if value is not None and not accepts(value):
                raise InputError(f"{section}.{field}={value} must be {rule}, or none")
        if not own.layers:
            continue
        _check_rows(config, section)


def _check_model(config: Config) -> None:
    model = config.model
    if model.head_dim < 2 or model.head_dim % 2:
        raise InputError(
            f"model.head_dim={model.head_dim} must be even and at least 2: rotary embedding turns "
            "pairs of dimensions"
        )
    if model.num_heads % model.num_kv_heads:
        raise InputError(
            f"model.num_heads={model.num_heads} does not divide by model.num_kv_heads="
            f"{model.num_kv_heads}; each KV head serves the same number of query heads"
        )
    if not 0 <= model.token_embedding_dropout < 1:
        raise InputError(
            f"model.token_embedding_dropout={model.token_embedding_dropout} must be in [0, 1)"
        )
    if model.rope_scaling != "none" and model.rope_original_len is None:
        raise InputError(
            f"model.rope_scaling={model.rope_scaling} needs model.rope_original_len, the tokens of "
            "a sequence in the training before"
        )
    if model.rope_scaling == "none" and model.rope_factor != 1:
        raise InputError(
            f"model.rope_factor={model.rope_factor} does nothing with model.rope_scaling=none; set "
            "it to llama3 or yarn"
        )
    _check_layers(config)


def _check_layers(config: Config) -> None:
    """Each layer is there, and of one kind."""
    count = config.model.num_layers
    listed_by: dict[int, str] = {}
    for key in layer_keys():
        layers = config.value_of(key)
        if any(not 0 <= layer < count for layer in layers):
            raise InputError(
                f"{key}={layers} is out of range; layers count from 0 to {count - 1} "
                f"(model.num_layers={count})"
            )
        if list(layers) != sorted(set(layers)):
            raise InputError(f"{key}={layers} must be increasing, each layer once")
    for key in layer_lists():
        layers = config.value_of(key)
        for layer in layers:
            if layer in listed_by:
                raise InputError(
                    f"layer {layer} is in {listed_by[layer]} and in {key}={layers}; a layer is of "
                    "one kind, so take it out of one of them"
                )
        listed_by |= dict.fromkeys(layers, f"{key}={layers}")
    model = config.model
    if model.hash_moe_layers and model.hash_moe_experts > model.vocab_size:
        raise InputError(
            f"model.hash_moe_experts={model.hash_moe_experts} is more than the "
            f"{model.vocab_size} ids of model.vocab_size that choose among them; lower it"
        )
    if model.hash_moe_layers and model.matmul_dtype == "float8":
        raise InputError(
            "model.matmul_dtype=float8 is not for the experts of model.hash_moe_layers="
            f"{model.hash_moe_layers}; leave one of the two unset"
        )


def _check_tables(config: Config) -> None:
    tables = config.tables
    axes = tables.vocab_axes
    allowed = ("data", "fsdp", "context")
    if any(axis not in allowed for axis in axes) or len(set(axes)) != len(axes):
        raise InputError(
            f"tables.vocab_axes={axes} must be a selection of {', '.join(allowed)}; the columns of "
            "the tables follow the tensor axis"
        )

    if config.model.stem_layers:
        _check_rows(config, "tables")
    if tables.trained_words is not None:
        _check_trained_words(config)


def _check_trained_words(config: Config) -> None:
    """Rows of other tokens keep their bits, so nothing may move them."""
    key = f"tables.trained_words={config.tables.trained_words}"
    if config.tables.optimizer == "dense_adamw":
        raise InputError(
            f"{key} moves the rows of some tokens, and tables.optimizer=dense_adamw moves every "
            "row in every step; use deferred_adamw"
        )
    if config.ngram.layers:
        raise InputError(
            f"{key} names tokens, and rows of ngram.layers={config.ngram.layers} belong to hashes "
            "of several; set tables.trained_words to none"
        )
    having = ["tables"] if config.model.stem_layers else []
    having += [name for name in MEMORY_SECTIONS if getattr(config, name).layers]
    if not having or not config.optimizer.trains_tables:
        raise InputError(
            f"{key}, but no rows train: the model has none, or optimizer.train=backbone; set it to "
            "none"
        )
    for section in having:
        decay = config.taken_key(f"{section}.weight_decay")
        if config.value_of(decay) != 0:
            raise InputError(
                f"{key} keeps the rows of other tokens as they are, and {decay}="
                f"{config.value_of(decay)} decays them; set {section}.weight_decay=0"
            )


def _check_rows(config: Config, section: str) -> None:
    """Of the rows of a memory that there is, with this section, against the optimizer of all."""

    def key_of(field: str) -> str:
        """The key that says it."""
        return TAKEN_KEYS[field] if section == "tables" else config.taken_key(f"{section}.{field}")

    optimizer, format_key = config.tables.optimizer, key_of("row_format")
    row_format = config.value_of(format_key)
    if row_format != "float32" and optimizer == "dense_adamw":
        raise InputError(
            f"{format_key}={row_format} rounds the rows that a batch touches, and "
            "tables.optimizer=dense_adamw moves every row in every step. Use deferred_adamw, or "
            f"{format_key}=float32"
        )
    resident_key = f"{section}.resident_rows"
    resident_rows = config.value_of(resident_key)
    if resident_rows is not None and optimizer == "dense_adamw":
        raise InputError(
            f"{resident_key}={resident_rows} needs an optimizer that touches only the rows of a "
            "batch; tables.optimizer=dense_adamw moves every row in every step. Use "
            f"deferred_adamw, or leave {resident_key} unset"
        )
    host_rows = config.value_of(f"{section}.host_rows")
    for key in (resident_key, "tables.disk"):
        if host_rows is not None and config.value_of(key) is None:
            raise InputError(
                f"{section}.host_rows={host_rows} keeps the other rows on disk, which needs {key}; "
                f"set it, or leave {section}.host_rows unset"
            )
    key1, key2 = map(key_of, ("beta1", "beta2"))
    beta1, beta2 = config.value_of(key1), config.value_of(key2)
    # Without a first moment no row coasts.
    coasts = config.value_of(key_of("moments")) == "adamw" and optimizer == "deferred_adamw"
    if coasts and beta1 >= max(beta2, 0) ** 0.5:
        raise InputError(
            f"{key1}={beta1} must be less than the square root of {key2}={beta2} "
            "for tables.optimizer=deferred_adamw: the steps a row missed would not die out; choose "
            "other betas, or tables.optimizer=dense_adamw"
        )


def _check_lora(config: Config) -> None:
    lora = config.lora
    unknown = [target for target in lora.targets if target not in LORA_TARGETS]
    if unknown or not lora.targets or len(set(lora.targets)) < len(lora.targets):
        raise InputError(
            f"lora.targets={','.join(lora.targets)} must be some of {', '.join(LORA_TARGETS)}, "
            "each once"
        )
    if lora.rank and not config.optimizer.trains_backbone:
        raise InputError(
            f"lora.rank={lora.rank} with optimizer.train={config.optimizer.train}: no adapter "
            "would train; set it to backbone (adapters alone) or all (and tables), or lora.rank=0"
        )


def _check_optimizer(config: Config) -> None:
    optimizer = config.optimizer
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            raise InputError(f"optimizer.{name}={getattr(optimizer, name)} must be in [0, 1)")
    steps = optimizer.schedule_steps or config.train.steps
    if optimizer.schedule == "wsd":
        if not 0 < optimizer.decay_fraction < 1:
            raise InputError(
                f"optimizer.decay_fraction={optimizer.decay_fraction} must be between 0 and 1"
            )
        if optimizer.min_lr_ratio <= 0:
            raise InputError("optimizer.min_lr_ratio=0 divides by zero in wsd; use e.g. 0.01")
    if optimizer.schedule in ("wsd", "cosine") and int(steps * optimizer.cycle_length) < 1:
        raise InputError(
            f"optimizer.cycle_length={optimizer.cycle_length} of {steps} steps is less than a step"
        )


def _check_batch(config: Config) -> None:
    train = config.train
    if train.global_batch_size % train.micro_batches:
        raise InputError(
            f"train.global_batch_size={train.global_batch_size} does not divide by "
            f"train.micro_batches={train.micro_batches}; choose a divisor"
        )
    if not 0 <= config.data.validation_fraction < 1:
        raise InputError(
            f"data.validation_fraction={config.data.validation_fraction} must be in [0, 1)"
        )
    mesh = config.mesh
    sizes = (mesh.data, mesh.fsdp, mesh.context, mesh.tensor)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(
            f"mesh.data, mesh.fsdp, mesh.context, mesh.tensor={sizes}: each must be at least 1, "
            "and at most one of them -1 (all remaining devices)"
        )
