"""Tokenizers of models on the hub: the files of one are copied, and of the weights nothing."""

import dataclasses

import pytest

from stem_jax import prepare
from stem_jax.config_file import load_config
from stem_jax.data.tokenizer import load_tokenizer, load_tokenizer_folder
from stem_jax.data.tokenizer_source import tokenizer_file, tokenizer_source
from stem_jax.errors import InputError
from stem_jax.interop.import_flags import parse
from stem_jax.training.run_data import run_tokenizer
from tests.children import ROOT

KEY, NAME = "data.tokenizer_path", "hf://org/model"
FOLDER = ROOT / "tests" / "data" / "facts_model"


@pytest.fixture
def model(hub):
    """A model of the hub with the tokenizer.json that FOLDER has, too."""
    files = {name: (FOLDER / name).read_bytes() for name in ("tokenizer.json", "config.json")}
    files["tokenizer_config.json"] = (FOLDER / "tokenizer_config.json").read_bytes()
    hub.files = files | {"model.safetensors": b"weights"}
    return hub


def test_a_run_takes_the_tokenizer_of_a_model(model, tmp_path):
    keys = {"data.tokenizer": "hf", KEY: NAME, "data.sources": "facts"}
    config = load_config(ROOT / "configs" / "tiny.py", keys)
    expected = load_tokenizer("hf", FOLDER / "tokenizer.json")
    size = dataclasses.replace(config.model, vocab_size=expected.vocab_size)
    config = dataclasses.replace(config, model=size)
    found = run_tokenizer(config, tmp_path, prepared=False)
    assert found == expected
    # A start that resumes does not ask the hub.
    model.refused = 503, ""
    assert run_tokenizer(config, tmp_path, prepared=True).fingerprint == expected.fingerprint
    copied = {path.name for path in (tmp_path / "hub").rglob("*.*")}
    assert "tokenizer_config.json" in copied and "model.safetensors" not in copied


def test_prepare_and_import_take_it(model, tmp_path):
    flags = ["--corpus=facts", "--tokenizer=hf", f"--tokenizer-path={NAME}"]
    prepare.main([*flags, f"--out={tmp_path / 'store'}", "--processes=1"])
    found = load_tokenizer_folder(tmp_path / "store" / "tokenizer")
    assert found.fingerprint == load_tokenizer("hf", FOLDER / "tokenizer.json").fingerprint
    flags = ["--from=hf", "--path=p", "--workdir=w", "--tokenizer=hf"]
    args, _, _ = parse([*flags, f"--tokenizer-path={NAME}"], "")
    assert args.tokenizer_path == NAME


@pytest.mark.parametrize(
    ("kind", "left_out", "have"),
    [
        ("sentencepiece", "", "tokenizer.json, which is kind hf"),
        ("hf", "tokenizer.json", "none at all"),
    ],
)
def test_a_model_without_such_a_tokenizer(model, kind, left_out, have):
    model.files.pop(left_out, None)
    with pytest.raises(InputError) as said:
        tokenizer_file(NAME, kind, KEY)
    assert str(said.value) == f"{KEY}={NAME} has no tokenizer of kind {kind}; it has {have}"


def test_no_network(model, tmp_path):
    model.server.shutdown()
    model.server.server_close()
    expected = rf"^--tokenizer-path={NAME}: the hub cannot be reached \(.*\); look at the network"
    flags = ["--corpus=facts", "--tokenizer=hf", f"--tokenizer-path={NAME}"]
    with pytest.raises(InputError, match=expected) as said:
        prepare.main([*flags, f"--out={tmp_path / 'store'}"])
    assert "\n" not in str(said.value) and not (tmp_path / "store").exists()


@pytest.mark.parametrize("text", ["hf://model", "hf://a/b/c", "hf://"])
def test_what_is_no_name_of_the_hub(text):
    with pytest.raises(InputError, match=r"is no name of a model; give hf://ORG/NAME"):
        load_config(ROOT / "configs" / "tiny.py", {KEY: text})
    with pytest.raises(InputError, match=r"^--tokenizer-path=.* is no name of a model"):
        tokenizer_source(text, "--tokenizer-path")
