"""Exports are closed worlds: what a format does not list is refused by name, not left out."""

import dataclasses

import pytest

from stem_jax import config as config_module
from stem_jax.config import MEMORY_SECTIONS, ModelConfig, before, model_keys
from stem_jax.config_keys import NOTHING, Role, key
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.errors import InputError
from stem_jax.interop import said_keys
from stem_jax.interop.hf_export import hf_config
from stem_jax.interop.official_format import official_params
from stem_jax.interop.said_keys import FORMATS, check_model

BYTES = load_tokenizer("bytes")
# Each key with a value off its default; a new key needs one here, and the formats' word on it.
OTHERS = {
    "stem_site": "gate",
    "hash_moe_layers": (0,),
    # Of a model without such layers it says nothing.
    "hash_moe_experts": 8,
    "tie_embeddings": True,
    "token_embedding_dropout": 0.1,
    "norm_eps": 1e-3,
    "rope_theta": 5e5,
    "rope_scaling": "llama3",
    "rope_factor": 2.0,
    "rope_original_len": 8,
    "init_std_factor": "dim_ratio",
    "init_base_std": 0.1,
    "param_dtype": "bfloat16",
    "compute_dtype": "bfloat16",
    "matmul_dtype": "float8",
    "attention": "chunked",
    "remat": "full",
    "scan_layers": True,
}
# Of these, what an export of a model with them says, or refuses.
REFUSED = {"hf": {"hash_moe_layers"}}
REFUSED["official"] = REFUSED["hf"] | {"stem_site", "rope_scaling"}


def _export(name: str, config):
    if name == "hf":
        return hf_config(config, BYTES, "float32")
    return official_params(config, "float32")


@pytest.mark.parametrize("field", OTHERS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_format_says_a_key_or_refuses_it_by_name(tiny_config, name, field):
    config = tiny_config()
    model = dataclasses.replace(config.model, **{field: OTHERS[field]})
    config = dataclasses.replace(config, model=model)
    if field not in REFUSED[name]:
        _export(name, config)
        return
    with pytest.raises(InputError) as refusal:
        _export(name, config)
    assert f"model.{field}={OTHERS[field]} has no counterpart in" in str(refusal.value)


@pytest.mark.parametrize("section", MEMORY_SECTIONS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_format_says_a_memory_or_refuses_it_by_name(tiny_config, name, section):
    """Their rows and readers would be left out, and another model written."""
    config = tiny_config(**{f"{section}.layers": (0,), "ngram.width": 32, "ngram.eos_id": 0})
    if section in said_keys.MEMORIES[name]:
        said = _export(name, config)["memories"]
        assert said[section].items() >= {"layers": [0]}.items()
        return
    with pytest.raises(InputError, match=rf"{section}.layers=\(0,\) has no counterpart in"):
        _export(name, config)


def test_every_key_can_be_decided():
    """A key that no format says has a value from before it, or passes as one of training alone."""
    sizes = set.intersection(*map(set, FORMATS.values()))
    assert set(model_keys()) == sizes | OTHERS.keys()
    for field, declared in model_keys().items():
        decided = declared.role is Role.HARMLESS or field in said_keys._OF_TRAINING
        for name, said in FORMATS.items():
            assert decided or field in said or before(field) is not NOTHING, (name, field)
    assert all(field in model_keys() for said in FORMATS.values() for field in said)


@dataclasses.dataclass(frozen=True)
class _Later(ModelConfig):
    """A model section that has two keys more, which no format knows."""

    sauce: str = key(Role.SHAPE, before="none", of_kind="stem")
    soup: int = key(Role.CONTINUED, before=0)


@pytest.fixture
def later(tiny_config, monkeypatch):
    """later(**values): a model of that section."""
    monkeypatch.setattr(config_module, "model_keys", lambda: config_module._section_keys(_Later))
    monkeypatch.setattr(said_keys, "model_keys", lambda: config_module._section_keys(_Later))

    def make(**values):
        model = dataclasses.asdict(tiny_config().model)
        return _Later(**{**model, "sauce": "none", "soup": 0, **values})

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_a_new_key_is_refused_until_a_format_says_it(later, name, monkeypatch):
    check_model(later(), name)
    for values in ({"sauce": "hot"}, {"soup": 3}):
        [(field, value)] = values.items()
        message = f"model.{field}={value} has no counterpart in .*no other format says it"
        with pytest.raises(InputError, match=message):
            check_model(later(**values), name)
    # One of a kind of layer that the model has none of does nothing.
    check_model(later(sauce="hot", stem_layers=()), name)
    [other] = FORMATS.keys() - {name}
    monkeypatch.setitem(FORMATS, other, FORMATS[other] | {"sauce"})
    with pytest.raises(InputError, match=f"use --format={other}"):
        check_model(later(sauce="hot"), name)
