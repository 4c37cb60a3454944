"""What the formats of other code can say of a model: each key of the model section, or not.

Of memories beside STEM's, exports for transformers say `value` and `per_layer`.

A closed world: what a format does not list must be as it was before there was such a key, or the
export is refused by name. So a new key is refused everywhere until a format says it.
"""

import dataclasses
from collections.abc import Iterator

from stem_jax.config import MEMORY_SECTIONS, Config, ModelConfig, before, model_keys
from stem_jax.config_keys import Role
from stem_jax.config_memories import MemoryConfig
from stem_jax.errors import InputError
from stem_jax.interop.memory_names import KEYS

_SIZES = frozenset(
    "vocab_size embed_dim num_layers num_heads num_kv_heads head_dim ffn_dim stem_layers "
    "tie_embeddings norm_eps rope_theta".split()
)
_ROPE = frozenset({"rope_scaling", "rope_factor", "rope_original_len"})
# Of each --format of an export, the keys that it says.
FORMATS = {
    "hf": _SIZES | _ROPE | {"stem_site"},
    # The last two of rotary scaling do nothing without the first.
    "official": (_SIZES | _ROPE | {"init_base_std", "init_std_factor"}) - {"rope_scaling"},
}
# And the memories beside STEM's, with the keys of their sections.
MEMORIES: dict[str, dict[str, tuple[str, ...]]] = {"hf": KEYS, "official": {}}
# What all sections of memories have: how rows are trained and where they lie, but for the layers.
_OF_ROWS = {field.name for field in dataclasses.fields(MemoryConfig)} - {"layers"}
_CALLED = {"hf": "the model code of an export for transformers", "official": "the official code"}
# How a model came to be, or in which numbers it computes: one trained so may be used by any code.
_OF_TRAINING = frozenset(
    "token_embedding_dropout init_std_factor init_base_std param_dtype compute_dtype "
    "matmul_dtype".split()
)


def check_format(config: Config, name: str) -> None:
    """Raises InputError for a key that matters, and that a format of FORMATS cannot say."""
    check_model(config.model, name)
    for key, layers in memories_beside_stem(config):
        section = key.partition(".")[0]
        fields = {field.name for field in dataclasses.fields(getattr(config, section))}
        if section in MEMORIES[name] and fields - _OF_ROWS == {*MEMORIES[name][section]}:
            continue
        others = [other for other in FORMATS if section in MEMORIES[other] and other != name]
        remedy = (
            f"; use --format={others[0]}"
            if others
            else ", and no other format says it; generate from such a run and evaluate it where it "
            f"is, or export one that was trained with {key}=none"
        )
        raise InputError(f"{key}={layers} has no counterpart in {_CALLED[name]}{remedy}")


def memories_beside_stem(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of each memory that a model has beside STEM's, the key of its layers and their indices."""
    for section in MEMORY_SECTIONS:
        if layers := getattr(config, section).layers:
            yield f"{section}.layers", layers


def check_model(model: ModelConfig, name: str) -> None:
    """As `check_format`, of the model section alone."""
    for field in _unsaid(model, name):
        others = [other for other in FORMATS if not any(_unsaid(model, other))]
        remedy = (
            f"use --format={others[0]}"
            if others
            else "no other format says it; generate, evaluate and edit such a run where it is, or "
            f"export one that was trained with model.{field}={before(field) or 'none'}"
        )
        raise InputError(
            f"model.{field}={getattr(model, field)} has no counterpart in {_CALLED[name]}; {remedy}"
        )


def _unsaid(model: ModelConfig, name: str) -> Iterator[str]:
    for field in unsaid_keys(model, FORMATS[name]):
        kind = model_keys()[field].of_kind
        if kind is None or model.listed_layers[kind]:
            yield field


def unsaid_keys(model: ModelConfig, said: frozenset[str]) -> Iterator[str]:
    """Fields beside the said ones that change what a model is, and are not as they were."""
    for field, key in model_keys().items():
        passed = field in said or field in _OF_TRAINING or key.role is Role.HARMLESS
        if not passed and not model.is_as_before(field):
            yield field
