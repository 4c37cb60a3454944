"""The values of our model section from the config.json of a Llama."""

from typing import Any

from stem_jax.errors import InputError
from stem_jax.json_fields import Fields
from stem_jax.model.ffn import SITES

# Values that change what is computed, with those that we compute.
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
    "is_causal": True,
    # Another file than the one that is read here.
    "transformers_weights": None,
}
_ROPE_ONLY: dict[str, dict[str, float | None]] = {
    "default": {},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": None,
        "mscale": None,
        "mscale_all_dim": None,
        "truncate": True,
    },
}
# Of every kind: read here, or the one value that we compute.
_ROPE_READ = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings")
_ROPE_ALWAYS = {"partial_rotary_factor": 1.0}


def llama_model_values(config: Fields) -> dict[str, Any]:
    """The values that a configuration of transformers gives, with its defaults where it has some.

    Raises:
        InputError: a key is missing, has a value of another kind, or asks for what we do not
            compute.
    """
    for key, value in _ONLY.items():
        if config.has(key) and config.values[key] != value:
            raise InputError(
                f"config.json has {key}={config.values[key]!r}, only {value!r} can be imported"
            )
    site = config.text("stem_site", "up")
    if site not in SITES:
        raise InputError(f"config.json has stem_site={site!r}, only {', '.join(SITES)} can be read")
    D, H = config.integer("hidden_size", least=1), config.integer("num_attention_heads", least=1)
    return {
        "vocab_size": config.integer("vocab_size", least=1),
        "embed_dim": D,
        "num_layers": config.integer("num_hidden_layers", least=1),
        "num_heads": H,
        "num_kv_heads": config.integer("num_key_value_heads", H, least=1),
        "head_dim": config.integer("head_dim", D // H, least=1),
        "ffn_dim": config.integer("intermediate_size", least=1),
        "stem_layers": config.integers("stem_layers", ()),
        "stem_site": site,
        "tie_embeddings": config.boolean("tie_word_embeddings", False),
        "norm_eps": config.number("rms_norm_eps"),
        **_rope_values(config),
    }


def llama_context(config: Fields) -> int:
    """Tokens that it was trained with."""
    return config.integer("max_position_embeddings", 2048, least=1)


def _rope_values(config: Fields) -> dict[str, Any]:
    # Before transformers 5 the base stood by itself, and the rest under rope_scaling, which still
    # comes first where both are there.
    key = next((k for k in ("rope_scaling", "rope_parameters") if config.values.get(k)), None)
    rope = Fields({}, "", "") if key is None else config.inner(key)
    theta = rope.number("rope_theta", None)
    theta = config.number("rope_theta", 10000.0) if theta is None else theta
    kind = rope.text("rope_type", None) or rope.text("type", "default")
    if kind not in _ROPE_ONLY:
        raise InputError(
            f"config.json has the rotary scaling {kind!r}, only {', '.join(_ROPE_ONLY)} can be "
            "imported"
        )
    only = _ROPE_ONLY[kind] | _ROPE_ALWAYS
    for name, found in rope.values.items():
        if name in only and found not in (None, only[name]):
            raise InputError(
                f"config.json has {name}={found!r} in its rotary scaling, only {only[name]!r} can "
                "be imported"
            )
        # Such as scalings by kind of layer, each an object; of numbers transformers reads none.
        if name not in only and name not in _ROPE_READ and isinstance(found, dict | list):
            raise InputError(
                f"config.json has {name}={found!r} in its rotary scaling, which cannot be imported"
            )
    if kind == "default":
        return {
            "rope_theta": theta,
            "rope_scaling": "none",
            "rope_factor": 1.0,
            "rope_original_len": None,
        }
    key = "original_max_position_embeddings"
    trained = config.integer(key, None, least=1) or rope.integer(key, None, least=1)
    return {
        "rope_theta": theta,
        "rope_scaling": kind,
        "rope_factor": rope.number("factor"),
        "rope_original_len": trained or llama_context(config),
    }
