"""FLOPs by formula against the compiler's count, and what decoding reads against the arrays."""

import math

import jax.numpy as jnp
import pytest

from stem_jax.analysis.cost_table import PATTERNS, check_cost, cost_table
from stem_jax.analysis.flop_check import check_flops, checked_config
from stem_jax.memory.catalogue import table_specs
from stem_jax.model.cost import decode_reads, forward_flops_per_token, generation_flops
from stem_jax.training.blueprint import ModelDef

# Matmuls dominate here; in a model of D 32 the sampler alone is a third of a decode step.
LARGE = {
    "model.vocab_size": 1024,
    "model.embed_dim": 512,
    "model.num_heads": 8,
    "model.ffn_dim": 1408,
    "model.num_layers": 2,
    "model.stem_layers": (1,),
    "train.seq_len": 128,
    "train.steps": 4,
}


@pytest.fixture(scope="module")
def checks(tiny_config):
    """By (program, whether STEM)."""
    found = check_cost(tiny_config(**LARGE))
    return {(check.program, bool(check.stem_layers)): check for check in found}


@pytest.mark.long
@pytest.mark.parametrize("stem", [False, True], ids=["dense", "stem"])
@pytest.mark.parametrize("program", ["prefill", "decode", "training"])
def test_formulas_are_within_two_percent_of_the_compiler(checks, program, stem):
    check = checks[program, stem]
    assert check.ratio == pytest.approx(1, abs=0.02)
    assert check.matmul_ratio == pytest.approx(1, abs=0.02)


@pytest.mark.long
def test_a_table_saves_its_matmul(checks):
    # 128 tokens, two FLOPs for each number of the projection.
    saved = checks["prefill", False].compiled - checks["prefill", True].compiled
    assert saved == pytest.approx(2 * 128 * 512 * 1408, rel=0.001)


def test_with_elementwise_work_the_formula_holds_for_small_models_too(tiny_config):
    small = {"model.embed_dim": 64, "model.ffn_dim": 192, "model.vocab_size": 1024}
    config = tiny_config(**small, **{"model.tie_embeddings": True, "train.seq_len": 64})
    for check in check_flops(checked_config(config), ("prefill", "decode")):
        assert check.ratio == pytest.approx(1, abs=0.02), check
        assert check.matmul_ratio < 0.98, check


def test_with_all_memories_it_holds_too(tiny_config):
    """Engram's masks are operations, and its keys, which no formula has, are counted alone."""
    memories = {
        "model.num_layers": 2,
        "model.stem_layers": (1,),
        "model.vocab_size": 258,
        # Wide, beside what the compiler does twice: it rotates keys for the cache once more.
        "model.ffn_dim": 160,
        "value.layers": (1,),
        "per_layer.layers": (0,),
        "per_layer.width": 12,
        "ngram.layers": (1,),
        "ngram.heads": 4,
        "ngram.keys_per_head": 300,
        "ngram.width": 32,
        "ngram.eos_id": 2,
        "train.seq_len": 32,
    }
    for check in check_flops(checked_config(tiny_config(**memories)), ("prefill", "decode")):
        # Without either it is more than this.
        assert check.ratio == pytest.approx(1, abs=0.0125), check
        assert check.keys > 100


def test_a_check_keeps_widths_and_context(tiny_config):
    config = tiny_config(
        **{
            "model.num_layers": 9,
            "model.stem_layers": (7, 8),
            "model.compute_dtype": "bfloat16",
        }
    )
    cut = checked_config(config)
    # Conversions would count as operations.
    assert cut.model.compute_dtype == cut.model.param_dtype == "float32"
    assert (cut.model.num_layers, cut.model.stem_layers) == (4, (3,))
    assert (cut.model.ffn_dim, cut.train.seq_len) == (48, 16)
    assert checked_config(tiny_config()).model.stem_layers == (1, 2)
    few = {f"{section}.resident_rows": 32 for section in ("tables", "value", "ngram")}
    whole = checked_config(tiny_config(**few, **{"value.layers": (0,)}))
    assert not any(spec.offloaded for spec in table_specs(whole).values())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_reads_the_arrays_that_there_are(tiny_config, tied, dtype):
    keys = {"model.tie_embeddings": tied, "model.token_embedding_dropout": 0.1}
    config = tiny_config(**keys, **{"model.param_dtype": dtype, "model.compute_dtype": dtype})
    sizes = {name: math.prod(s.shape) for name, s in ModelDef(config).shapes().items()}
    # Neither the vector of dropped tokens nor, but for one vector, an embedding that is no head.
    del sizes["embed.dropped"]
    if not tied:
        sizes["embed.weight"] = 32
    keys_and_values = 2 * 16 * config.model.num_kv_heads * config.model.head_dim
    reads = decode_reads(config, 16)
    assert reads.backbone == sum(sizes.values())
    assert reads.row == 2 * 48
    assert reads.cache == 3 * keys_and_values
    width = jnp.dtype(dtype).itemsize
    assert reads.bytes == width * (reads.backbone + reads.cache) + 4 * reads.row


def test_the_table_goes_from_dense_to_all_layers(tiny_config):
    config = tiny_config()
    records = cost_table(config)
    assert [record["pattern"] for record in records] == [*PATTERNS, "own"]
    assert records[-1]["stem_layers"] == [1, 2] == records[3]["stem_layers"]
    for key in ("active", "training_flops", "prefill_flops", "decode_flops", "read_bytes"):
        values = [record[key] for record in records[:-1]]
        assert values == sorted(values, reverse=True) and values[0] > values[-1], key
    assert [record["table"] for record in records[:2]] == [0, 88 * 48]
    # A whole prompt costs what its tokens cost, but for the head, which sees one of them.
    head = 2 * 88 * 32
    prompt = generation_flops(config, 16, 16).matmul
    assert prompt == 16 * (forward_flops_per_token(config, 16) - head) + head
