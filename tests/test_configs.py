"""The closed world of keys, the shipped configurations, and every refusal with its remedy."""

import ast
import dataclasses
import math
import re
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from configs.base import get_config as base_config
from stem_jax.config import Config, layer_fields
from stem_jax.config_file import build, config_from_json, load_config
from stem_jax.errors import InputError
from stem_jax.memory.catalogue import table_specs
from stem_jax.training.blueprint import ModelDef

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
KEYS = [f"{section}.{key}" for section, keys in base_config().items() for key in keys]


def _build(**overrides) -> Config:
    raw = base_config().to_dict()
    for key, value in overrides.items():
        section, name = key.split(".")
        raw[section][name] = value
    return build(raw)


def _backbone_parameters(config: Config) -> int:
    return sum(math.prod(shape.shape) for shape in ModelDef(config).shapes().values())


# --- The shipped files ---


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_builds(path):
    config = load_config(path)
    assert config_from_json(config.to_json()) == config
    text = path.read_text()
    if path.stem != "base":
        # It opens with the command that runs it.
        assert f"python -m stem_jax.train --config=configs/{path.name}" in text


@pytest.mark.parametrize("name", ["stem_1b_offload", "tiny_offload"])
def test_shipped_offload_configs_hold_the_batches_in_flight(name):
    """Text repeats itself more than tokens drawn by Zipf's law: what these ask for is enough."""
    config = load_config(ROOT / "configs" / f"{name}.py")
    spec = table_specs(config)["stem"]
    tokens = (config.tables.prefetch + 1) * config.tokens_per_step
    share_V = 1 / np.arange(1, config.model.vocab_size + 1)
    asked = np.sum(1 - (1 - share_V / share_V.sum()) ** tokens)
    assert spec.offloaded and asked * 1.05 < spec.num_slots
    for devices in (1, 2, 4, 8, 16):
        assert spec.num_slots % devices == 0


def test_a_dense_model_has_no_rows_to_offload():
    assert table_specs(_build(**{"model.stem_layers": "none", "tables.resident_rows": 8})) == {}


@pytest.mark.parametrize(
    ("name", "backbone", "tables"),
    [
        ("stem_1b", 1_414_596_608, 5_253_365_760),
        ("dense_1b", 1_498_482_688, 0),
        ("stem_350m", 336_753_600, 1_310_720_000),
        ("dense_350m", 376_075_200, 0),
    ],
)
def test_parameter_counts(name, backbone, tables):
    config = load_config(ROOT / "configs" / f"{name}.py")
    assert _backbone_parameters(config) == backbone
    assert sum(spec.num_parameters for spec in table_specs(config).values()) == tables


@pytest.mark.parametrize(
    ("name", "published", "tables"),
    # Millions of parameters in arXiv 2601.10639: dense or active, and in the tables.
    [("stem_1b", 1415, 5253), ("dense_1b", 1498, 0)],
)
def test_published_counts(name, published, tables):
    config = load_config(ROOT / "configs" / f"{name}.py")
    assert round(_backbone_parameters(config) / 1e6) == published
    found = sum(spec.num_parameters for spec in table_specs(config).values())
    assert round(found / 1e6) == tables


def test_350m_is_mobilellm_350m():
    """345.3 M in arXiv 2402.14905, where the head is the embedding."""
    tied = {"model.tie_embeddings": "true"}
    dense = load_config(ROOT / "configs" / "dense_350m.py", tied)
    assert round(_backbone_parameters(dense) / 1e5) == 3454
    text = (ROOT / "configs" / "stem_350m.py").read_text()
    for layers, total in (("third", "1.25 B"), ("half", "1.65 B"), ("all_but_first", "2.84 B")):
        config = load_config(ROOT / "configs" / "stem_350m.py", {"model.stem_layers": layers})
        parameters = _backbone_parameters(config) + table_specs(config)["stem"].num_parameters
        assert f"{parameters / 1e9:.2f} B" == total and total in text


def test_published_settings():
    """Of arXiv 2601.10639."""
    for name in ("stem_1b", "dense_1b", "stem_1b_offload"):
        config = load_config(ROOT / "configs" / f"{name}.py")
        assert config.optimizer.learning_rate == 4e-4
    long = load_config(ROOT / "configs" / "stem_350m_long.py")
    before = load_config(ROOT / "configs" / "stem_350m.py")
    assert long.train.seq_len == 32768 == long.model.rope_factor * before.train.seq_len
    assert long.tokens_per_step == before.tokens_per_step


@pytest.mark.parametrize("name", ["tiny", "stem_1b", "stem_350m"])
def test_dense_twins_differ_in_stem_layers_alone(name):
    stem = load_config(ROOT / "configs" / f"{name}.py")
    twin = "tiny_dense" if name == "tiny" else name.replace("stem", "dense")
    dense = load_config(ROOT / "configs" / f"{twin}.py")
    assert dense.model.stem_layers == ()
    assert (
        dataclasses.replace(
            dense, model=dataclasses.replace(dense.model, stem_layers=stem.model.stem_layers)
        )
        == stem
    )


# --- Keys ---


def test_keys_in_two_levels():
    assert not any(
        isinstance(value, ml_collections.ConfigDict)
        for section in base_config().values()
        for value in section.values()
    )


def test_every_key_is_read():
    """By its name, as an attribute; config_checks.py only checks."""
    sources = [
        path.read_text()
        for path in (ROOT / "stem_jax").rglob("*.py")
        if path.name != "config_checks.py"
    ]
    read = {
        node.attr
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    # mesh.make_mesh reads the axes by name, and `listed_layers` the lists of layers.
    read |= {"data", "fsdp", "context", "tensor", *layer_fields().values()}
    assert [key for key in KEYS if key.partition(".")[2] not in read] == []


def test_an_unknown_key_is_refused():
    with pytest.raises(InputError, match=r"unknown config key train.stepz; did you mean"):
        _build(**{"train.stepz": 3})
    raw = base_config().to_dict()
    with pytest.raises(InputError, match=r"config key modle; did you mean model\?"):
        build({**raw, "modle": {}})
    with pytest.raises(InputError, match=r"config key zzz; configs/base\.py lists every key"):
        build({**raw, "zzz": {}})


def test_a_missing_key_is_refused():
    raw = base_config().to_dict()
    del raw["train"]["seed"]
    with pytest.raises(InputError, match=r"train\.seed is missing; configs/base.py declares it"):
        build(raw)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"train.stesp": "5"}, "unknown config key train.stesp; did you mean train.steps?"),
        ({"trian.steps": "5"}, "unknown config key trian.steps; did you mean train.steps?"),
        ({"qqqq": "5"}, "unknown config key qqqq; configs/base.py lists every key"),
        ({"train.steps": "5.5"}, "train.steps=5.5 is a float; it must be int"),
        ({"train.steps": "many"}, "train.steps='many' is a str; it must be int"),
        ({"train.steps": "none"}, "train.steps='none' is a str; it must be int"),
        ({"train.steps": "true"}, "train.steps=True is a bool; it must be int"),
        ({"optimizer.beta1": "x"}, "optimizer.beta1='x' is a str; it must be float"),
        ({"eval.baselines": "1"}, "eval.baselines=1 is a int; it must be bool"),
        ({"eval.max_batches": "a"}, "eval.max_batches='a' is a str; it must be int or none"),
        ({"model.stem_layers": "1,x"}, "'1,x' is neither one of none, third, half"),
    ],
)
def test_wrong_overrides_are_refused(override, message):
    with pytest.raises(InputError, match=re.escape(message)):
        load_config(ROOT / "configs" / "tiny.py", override)


def test_overrides_are_applied():
    config = load_config(
        ROOT / "configs" / "tiny.py",
        {
            "train.steps": "7",
            "optimizer.learning_rate": "1",
            "tables.vocab_axes": "fsdp",
            "eval.baselines": "false",
            "eval.max_batches": "none",
            "train.sample_prompt": "42",
            "model.stem_layers": "0,5",
        },
    )
    assert config.train.steps == 7 and config.train.sample_prompt == "42"
    assert config.optimizer.learning_rate == 1.0
    assert config.tables.vocab_axes == ("fsdp",) and config.model.stem_layers == (0, 5)
    assert config.eval.baselines is False and config.eval.max_batches is None


# --- Values ---


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("none", ()),
        ("third", (1, 4, 7)),
        ("half", (1, 3, 5, 7)),
        ("all_but_first", (1, 2, 3, 4, 5, 6, 7)),
        ("all", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("1,3", (1, 3)),
        ("(1, 3)", (1, 3)),
        ((1, 3), (1, 3)),
    ],
)
def test_stem_layer_patterns(pattern, layers):
    model = _build(**{"model.num_layers": 8, "model.stem_layers": pattern}).model
    assert model.stem_layers == layers and model.num_stem_layers == len(layers)


def test_the_published_third_of_sixteen_layers():
    assert load_config(ROOT / "configs" / "stem_1b.py").model.stem_layers == (1, 4, 7, 10, 13)


def test_derived_sizes():
    config = _build(**{"train.global_batch_size": 12, "train.micro_batches": 3})
    assert config.model.head_dim == 32
    assert (config.micro_batch_size, config.tokens_per_step) == (4, 12 * 256)
    assert config.table_weight_decay == 0.1
    assert config.table_init_std == pytest.approx((2 / (4096 + 384)) ** 0.5)
    own = _build(**{"tables.weight_decay": 0.0, "tables.init_std": 0.3, "model.head_dim": 64})
    assert (own.table_weight_decay, own.table_init_std, own.model.head_dim) == (0.0, 0.3, 64)


REFUSED = [
    ({"model.init_std_factor": "deep"}, "model.init_std_factor='deep' is unknown; choose one of"),
    ({"model.param_dtype": "float16"}, "model.param_dtype='float16' is unknown; choose one of"),
    ({"model.compute_dtype": "int8"}, "model.compute_dtype='int8' is unknown; choose one of"),
    ({"model.attention": "flash"}, "model.attention='flash' is unknown; choose one of auto"),
    (
        {"model.remat": "all"},
        "model.remat='all' is unknown; choose one of none, full, attention, dots, offload",
    ),
    ({"tables.row_format": "float16"}, "row_format='float16' is unknown; choose one of float32, b"),
    ({"tables.moments": "lion"}, "tables.moments='lion' is unknown; choose one of adamw, rowwise"),
    (
        {"tables.row_format": "bfloat16", "tables.optimizer": "dense_adamw"},
        "tables.row_format=bfloat16 rounds the rows that a batch touches",
    ),
    ({"tables.weight_decay": -0.1}, "tables.weight_decay=-0.1 must be 0 or more, or none"),
    ({"optimizer.learning_rate": float("inf")}, "optimizer.learning_rate=inf must be more than 0"),
    ({"tables.optimizer": "sgd"}, "tables.optimizer='sgd' is unknown; choose one of"),
    ({"data.tokenizer": "bpe"}, "data.tokenizer='bpe' is unknown; choose one of sentencepiece"),
    ({"optimizer.schedule": "step"}, "optimizer.schedule='step' is unknown; choose one of"),
    ({"optimizer.decay_mask": "none"}, "optimizer.decay_mask='none' is unknown; choose one of"),
    ({"model.embed_dim": 130}, "model.embed_dim=130 does not divide by model.num_heads=4; set"),
    ({"model.head_dim": 33}, "model.head_dim=33 must be even and at least 2"),
    ({"model.num_kv_heads": 3}, "model.num_heads=4 does not divide by model.num_kv_heads=3"),
    ({"model.stem_layers": (1, 4)}, "model.stem_layers=(1, 4) is out of range; layers count from"),
    ({"model.stem_layers": (3, 1)}, "model.stem_layers=(3, 1) must be increasing, each layer once"),
    ({"model.stem_layers": (1, 1)}, "model.stem_layers=(1, 1) must be increasing, each layer once"),
    ({"model.stem_layers": ()}, 'model.stem_layers is empty; write "none" for no layers'),
    ({"tables.vocab_axes": ("tensor",)}, "tables.vocab_axes=('tensor',) must be a selection of"),
    ({"tables.vocab_axes": ("data", "data")}, "must be a selection of data, fsdp"),
    ({"optimizer.beta1": 1.0}, "optimizer.beta1=1.0 must be in [0, 1)"),
    ({"optimizer.beta2": -0.1}, "optimizer.beta2=-0.1 must be in [0, 1)"),
    (
        {"optimizer.schedule": "wsd", "optimizer.decay_fraction": 1.0},
        "optimizer.decay_fraction=1.0 must be between 0 and 1",
    ),
    (
        {"optimizer.schedule": "wsd", "optimizer.min_lr_ratio": 0.0},
        "optimizer.min_lr_ratio=0 divides by zero in wsd; use e.g. 0.01",
    ),
    ({"optimizer.cycle_length": 0.001}, "optimizer.cycle_length=0.001 of 100 steps is less than"),
    (
        {"train.micro_batches": 3},
        "train.global_batch_size=16 does not divide by train.micro_batches=3; choose a divisor",
    ),
    ({"data.validation_fraction": 1.0}, "data.validation_fraction=1.0 must be in [0, 1)"),
    (
        {"mesh.fsdp": -1},
        "mesh.fsdp, mesh.context, mesh.tensor=(-1, -1, 1, 1): each must be at least 1",
    ),
    ({"mesh.tensor": 0}, "at most one of them -1 (all remaining devices)"),
]
# Bounds: value refused, and the rule that the message names.
BOUNDS = {
    (0, "must be at least 1"): [
        "model.vocab_size",
        "model.embed_dim",
        "model.num_layers",
        "model.num_heads",
        "model.num_kv_heads",
        "model.ffn_dim",
        "tables.pad_multiple",
        "train.steps",
        "train.global_batch_size",
        "train.micro_batches",
        "train.seq_len",
        "train.max_bad_steps",
        "train.log_every",
        "checkpoint.keep",
    ],
    (-1, "must be 0 or more"): [
        "optimizer.weight_decay",
        "optimizer.warmup_steps",
        "optimizer.min_lr_ratio",
        "train.seed",
        "train.z_loss",
        "train.sample_tokens",
        "eval.every",
        "checkpoint.every",
        "mesh.max_replicated_mib",
    ],
    (0, "must be more than 0"): [
        "model.norm_eps",
        "model.rope_theta",
        "tables.lr_multiplier",
        "tables.clip_norm",
        "tables.init_std",
        "tables.capacity",
        "train.loss_chunk",
        "optimizer.learning_rate",
        "optimizer.epsilon",
        "optimizer.clip_norm",
        "optimizer.schedule_steps",
        "optimizer.cycle_length",
        "optimizer.cosine_theta",
        "optimizer.inv_sqrt_exponent",
        "eval.max_batches",
        "model.init_base_std",
    ],
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_values_that_cannot_work_are_refused(overrides, message):
    with pytest.raises(InputError, match=re.escape(message)):
        _build(**overrides)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [(key, value, rule) for (value, rule), keys in BOUNDS.items() for key in keys],
)
def test_bounds_name_the_rule(key, value, rule):
    with pytest.raises(InputError, match=rf"{re.escape(key)}={value}.*{rule}"):
        _build(**{key: value})
