"""Values of a config.json: each is what transformers makes of it, or it is refused by name."""

import pytest
import transformers

from stem_jax.errors import InputError
from stem_jax.interop.llama_config import llama_context, llama_model_values
from stem_jax.json_fields import Fields

SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
}
YARN = {"rope_type": "yarn", "factor": 2.0}


def _fields(**changes):
    return Fields({**SIZES, **changes}, "config.json", "give the file that belongs to the model")


@pytest.mark.parametrize("value", [None, 1.5, True, 10**12, 0, -3, "32", [32], {}, float("nan")])
@pytest.mark.parametrize("key", [key for key in SIZES if key != "rms_norm_eps"])
def test_sizes_that_are_none(key, value):
    with pytest.raises(InputError) as refused:
        llama_model_values(_fields(**{key: value}))
    shown = "null" if value is None else "true" if value is True else repr(value)
    said = str(refused.value)
    assert said.startswith(f"config.json: {key} is {shown}"), said
    assert said.endswith("; give the file that belongs to the model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": True}, "rms_norm_eps is true, expected a number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', expected a number"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf, expected a number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ({"rope_theta": True}, "rope_theta is true, expected a number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or f"),
        ({"tie_word_embeddings": 1.5}, "tie_word_embeddings is 1.5, expected true or false"),
        ({"num_key_value_heads": True}, "num_key_value_heads is true, expected a whole"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, expected a number from 1"),
        ({"head_dim": 8.0}, "head_dim is 8.0, expected a whole number"),
        ({"stem_layers": "third"}, "stem_layers is 'third', expected a list"),
        ({"stem_layers": [True]}, "stem_layers is [True], expected a list"),
        ({"is_causal": False}, "is_causal=False, only True can be imported"),
        ({"transformers_weights": "b.safetensors"}, "only None can be imported"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        ({"rope_parameters": {"rope_type": 3}}, "rope_parameters: rope_type is 3, expected a t"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "has partial_rotary_factor=0.5 in"),
        ({"rope_parameters": {"full_attention": {}}}, "has full_attention={} in its rotary scal"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: factor is missing"),
        ({"rope_parameters": YARN | {"factor": True}}, "factor is true, expected a number"),
    ],
)
def test_values_that_are_refused(changes, message):
    with pytest.raises(InputError) as refused:
        llama_model_values(_fields(**changes))
    assert message in str(refused.value)
    assert len(str(refused.value)) < 250


@pytest.mark.parametrize("value", [1.5, True, 10**12, "many", 0])
def test_a_context_that_is_none(value):
    with pytest.raises(InputError, match=f"max_position_embeddings is {str(value).lower()[:4]}|'"):
        llama_context(_fields(max_position_embeddings=value))


NULL = dict.fromkeys(
    ["num_key_value_heads", "head_dim", "rope_scaling", "rope_parameters", "stem_layers"]
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        NULL | {"max_position_embeddings": 64},
        {"rope_theta": 5e5},
        {"rope_scaling": YARN, "rope_theta": 5e5},
        {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}},
        {"rope_parameters": YARN | {"original_max_position_embeddings": 16}},
        {
            "rope_parameters": YARN | {"original_max_position_embeddings": 16},
            "original_max_position_embeddings": 24,
        },
        {"rope_parameters": {"rope_theta": 7.0, "partial_rotary_factor": 1.0}, "rope_theta": 8.0},
    ],
)
def test_values_are_those_of_transformers(changes):
    ours = llama_model_values(_fields(**changes))
    given = {key: value for key, value in changes.items() if key != "stem_layers"}
    theirs = transformers.LlamaConfig(**SIZES, **given)
    # The model does it once more, with all keys of the file in place.
    theirs.standardize_rope_params()
    rope = theirs.rope_parameters
    assert (ours["num_kv_heads"], ours["head_dim"]) == (theirs.num_key_value_heads, theirs.head_dim)
    assert ours["rope_theta"] == rope["rope_theta"]
    assert ours["rope_scaling"] == rope["rope_type"].replace("default", "none")
    assert ours["rope_original_len"] == rope.get("original_max_position_embeddings")
    assert llama_context(_fields(**changes)) == theirs.max_position_embeddings
