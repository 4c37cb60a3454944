"""Variants: files of a few lines that begin alike where they are alike, and what is refused."""

import copy
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from configs.study.base import get_config as study_base
from stem_jax.config_file import load_config
from stem_jax.errors import InputError
from stem_jax.memory.catalogue import with_eos
from stem_jax.model.draws import parameter_key
from stem_jax.study.variants import load_variant
from stem_jax.training.blueprint import ModelDef

FOLDER = Path(__file__).parents[2] / "configs" / "study" / "variants"
NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
SMALL = {"vocab_size": 256, "embed_dim": 32, "ffn_dim": 96}


def _params(name: str, seed: int = 3, init: str = "name") -> dict[str, np.ndarray]:
    base = study_base()
    base.model.update(SMALL)
    base.train.seed = seed
    base.train.init = init
    config = with_eos(load_variant(name).config_of(base), 0)
    return {name: np.asarray(value) for name, value in ModelDef(config).init().items()}


@pytest.fixture(scope="module")
def params():
    return {name: _params(name) for name in NAMES}


def _alike(one: dict, other: dict) -> list[str]:
    return [name for name in one if name in other and one[name].shape == other[name].shape]


@pytest.mark.parametrize(("one", "other"), itertools.combinations(NAMES, 2))
def test_equal_names_and_shapes_begin_with_equal_bits(params, one, other):
    alike = _alike(params[one], params[other])
    # Embedding, head, last norm; four projections and two norms of each of four layers.
    assert len(alike) >= 3 + 4 * 6
    for name in alike:
        np.testing.assert_array_equal(params[one][name], params[other][name], err_msg=name)


def test_by_count_they_do_not():
    dense, stem = (_params(name, init="count") for name in ("dense", "stem_half"))
    assert not np.array_equal(dense["head.kernel"], stem["head.kernel"])


@pytest.mark.parametrize("name", ["stem_ngram", "hash_moe", "per_layer"])
def test_no_two_parameters_share_a_draw(params, name):
    """Keys draw the same bits first whatever the shape, so what is drawn first would be alike."""
    firsts = [
        value.ravel()[:8] / np.abs(value.ravel()[:8]).max()
        for value in params[name].values()
        if np.unique(value).size > 1
    ]
    assert len(firsts) > 20
    for one, other in itertools.combinations(firsts, 2):
        assert not np.allclose(one, other, rtol=1e-4)


def test_a_seed_draws_all_anew(params):
    other = _params("stem_ngram", seed=4)
    for name, value in params["stem_ngram"].items():
        if np.unique(value).size > 1:
            assert not np.array_equal(value, other[name]), name


def test_a_key_is_of_seed_and_name():
    keys = {
        tuple(np.asarray(parameter_key(seed, name)._base_array).tolist())
        for seed in (0, 1)
        for name in ("blocks.1.ffn.up_proj.kernel", "blocks.11.ffn.up_proj.kernel", "embed.weight")
    }
    assert len(keys) == 6


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_is_few_lines_and_leaves_the_base(name):
    base, before = study_base(), study_base().to_dict()
    variant = load_variant(name)
    config = variant.config_of(base)
    assert base.to_dict() == before and variant.name == name
    assert variant.says.endswith(".") and "\n" not in variant.says
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 32
    dense = load_variant("dense").config_of(base)
    for section in ("data", "train", "eval", "checkpoint"):
        assert getattr(config, section) == getattr(dense, section)
    # Of the backbone; a control leaves the rows as they are.
    assert dataclasses.replace(config.optimizer, train="all") == dense.optimizer
    assert config.optimizer.trains_tables == (name != "stem_frozen")


def test_the_base_is_a_configuration_of_its_own():
    path = FOLDER.parent / "base.py"
    config = load_config(path)
    assert config == load_variant("dense").config_of(study_base())
    assert "python -m stem_jax.train --config=configs/study/base.py" in path.read_text()
    tokens = config.train.steps * config.tokens_per_step
    assert 4_000_000 - config.tokens_per_step < tokens <= 4_000_000
    assert config.train.init == "name"


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        '"""Mine: half as wide,\nwith rows."""\n'
        "from configs.study.variants.stem_half import vary as half\n\n"
        "def vary(config):\n    half(config)\n    config.model.ffn_dim //= 2\n"
    )
    variant = load_variant(path)
    assert (variant.name, variant.says) == ("mine", "Mine: half as wide, with rows.")
    config = variant.config_of(study_base())
    assert config.model.ffn_dim == 96 and config.model.stem_layers == (1, 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"variant .*x\.py: it has no function vary\(config\)"),
        ("vary = 3", "it has no function vary"),
        ("def vary(", "x.py: SyntaxError"),
        ("import nothing_such", "x.py: ModuleNotFoundError: No module named 'nothing_such'"),
    ],
)
def test_a_file_that_is_none(tmp_path, text, said):
    path = tmp_path / "x.py"
    path.write_text(text)
    with pytest.raises(InputError, match=said) as raised:
        load_variant(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("config.model.stem_layer = 'half'", "variant x: unknown config key model.stem_layer;"),
        ("config.model.ffn_dim = 'wide'", "variant x: .*wide"),
        ("config.optimizer.learning_rate = -1.0", "variant x: optimizer.learning_rate=-1.0"),
        ("1 / 0", "variant x: division by zero"),
    ],
)
def test_a_variant_that_is_refused(tmp_path, line, said):
    path = tmp_path / "x.py"
    path.write_text(f"def vary(config):\n    {line}\n")
    with pytest.raises(InputError, match=said) as raised:
        load_variant(path).config_of(copy.deepcopy(study_base()))
    assert "\n" not in str(raised.value)


def test_names_are_known():
    with pytest.raises(InputError, match=r"did you mean --variant=stem_half.* dense_minus"):
        load_variant("stem_hlf")
    with pytest.raises(InputError, match=r"variant nowhere/x\.py does not exist"):
        load_variant("nowhere/x.py")
