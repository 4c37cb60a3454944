"""What variants match each other in, at three sizes: parameters, FLOPs by formula and compiled."""

import dataclasses

import pytest

from configs.study.base import get_config as study_base
from stem_jax.analysis.flop_check import step_flops
from stem_jax.model import hash_moe
from stem_jax.study.sizes import compiled_flops, size_of
from stem_jax.study.variants import load_variant

WIDE = {"embed_dim": 192, "num_layers": 6, "num_heads": 6, "num_kv_heads": 6, "ffn_dim": 512}
LARGE = {"embed_dim": 512, "num_layers": 12, "num_heads": 8, "num_kv_heads": 8, "ffn_dim": 1536}
SIZES = [{}, WIDE, LARGE | {"vocab_size": 32000}]


def _config(name: str, size: dict | None = None):
    base = study_base()
    base.model.update(size or {})
    return load_variant(name).config_of(base)


def _sizes(size: dict, *names: str) -> list[dict[str, int]]:
    return [size_of(_config(name, size)) for name in names]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["ngram", "ngram_value"])
def test_ngrams_are_as_large_as_stem_half(name, size):
    ngram, stem = _sizes(size, name, "stem_half")
    assert ngram["parameters"] == pytest.approx(stem["parameters"], rel=0.01)


@pytest.mark.parametrize("size", SIZES)
def test_dense_minus_is_as_active_as_stem_half(size):
    dense, stem = _sizes(size, "dense_minus", "stem_half")
    for key in ("active_parameters", "flops_per_token"):
        assert dense[key] == pytest.approx(stem[key], rel=0.01), key


@pytest.mark.parametrize("size", SIZES)
def test_hash_layers_are_the_nearest_number_of_ffns(size):
    config = _config("hash_moe", size)
    (stem,) = _sizes(size, "stem_half")

    def away(more: int) -> int:
        model = dataclasses.replace(
            config.model, hash_moe_experts=config.model.hash_moe_experts + more
        )
        parameters = size_of(dataclasses.replace(config, model=model))["parameters"]
        return abs(parameters - stem["parameters"])

    assert away(0) <= min(away(-1), away(1))
    assert config.model.hash_moe_layers == _config("stem_half", size).model.stem_layers


@pytest.mark.parametrize("size", SIZES)
def test_tables_of_one_size(size):
    stem, per_layer, value = _sizes(size, "stem_half", "per_layer", "value")
    assert per_layer["table_parameters"] == stem["table_parameters"]
    model = _config("value", size).model
    assert value["table_parameters"] * model.ffn_dim == stem["table_parameters"] * model.embed_dim


def test_the_core_size():
    assert size_of(_config("dense")) == {
        # 2 x 2048 x 64, four layers of 4 x 64^2 + 3 x 64 x 192, nine norms.
        "parameters": 475_712,
        "active_parameters": 475_712,
        "table_parameters": 0,
        # 6 for each weight but the embedding's and norms'; attention 12 x 256 x 64 a layer.
        "flops_per_token": 6 * (475_712 - 2048 * 64 - 9 * 64) + 4 * 12 * 256 * 64,
    }


@pytest.mark.long
@pytest.mark.optimized
def test_compiled_flops_of_dense_minus_are_stem_halfs():
    dense, stem, whole = (
        compiled_flops(_config(name)) for name in ("dense_minus", "stem_half", "dense")
    )
    assert dense == pytest.approx(stem, rel=0.01)
    assert whole > 1.04 * stem
    for flops, name in ((dense, "dense_minus"), (stem, "stem_half"), (whole, "dense")):
        # Beside matmuls a program has norms, softmax and optimizers.
        assert 1.02 < flops / size_of(_config(name))["flops_per_token"] < 1.04


@pytest.mark.long
@pytest.mark.optimized
def test_hash_layers_by_formula_are_those_of_a_program_of_one_expert(monkeypatch):
    """Compiled for a CPU, rows go through every expert or through loops that count once."""
    config = _config("hash_moe")
    assert compiled_flops(config) is None
    monkeypatch.setitem(hash_moe.WAYS, "cpu", "ragged")
    one = dataclasses.replace(config, model=dataclasses.replace(config.model, hash_moe_experts=1))
    assert size_of(one)["flops_per_token"] == size_of(config)["flops_per_token"]
    compiled = step_flops(one) / one.tokens_per_step
    assert 1.02 < compiled / size_of(config)["flops_per_token"] < 1.04
