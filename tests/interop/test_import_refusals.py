"""Imports that are refused: in one line, with nothing left behind, and without running code."""

import json
import pickle
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from stem_jax import cli, export, import_torch
from stem_jax.data.sentencepiece_training import train_sentencepiece
from stem_jax.interop import names
from stem_jax.interop.import_tokenizer import TokenizerChoice, find_tokenizer
from tests.interop.test_import import few_ids_flags, write_llama, write_official
from tests.saved_models import BYTES


@pytest.fixture(scope="module")
def few_ids(tmp_path_factory):
    return few_ids_flags(tmp_path_factory.mktemp("tokenizer"))


def test_tables_that_differ(few_ids, tmp_path, monkeypatch, capsys):
    path = write_official(tmp_path / "source", "stem_gqa")
    files = [path / "consolidated" / name for name in ("consolidated.pth", "consolidated_stem.pth")]
    whole, tables = (torch.load(file, weights_only=True) for file in files)
    flags = ["--from=official", f"--path={path}", f"--workdir={tmp_path / 'run'}", *few_ids]
    torch.save({"model": whole["model"] | tables}, files[0])
    monkeypatch.setattr(names, "_PIECE_BYTES", 5000)
    import_torch.main([*flags, f"--workdir={tmp_path / 'same'}"])
    tables["stem_embeddings.1.weight"][-1, -1] += 1e-6
    torch.save({"model": whole["model"] | tables}, files[0])
    error = _refusal(import_torch.main, flags, monkeypatch, capsys)
    assert f"stem_embeddings.1.weight in {files[0]} differs from" in error


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.ones(3), "holds a Tensor as its model, expected a dictionary"),
        ({9: torch.ones(3)}, "has the key 9, expected names of tensors"),
    ],
)
def test_no_model_in_a_file(model, message, few_ids, tmp_path, monkeypatch, capsys):
    path = write_official(tmp_path / "source", "stem_gqa")
    torch.save({"model": model}, path / "consolidated" / "consolidated.pth")
    flags = ["--from=official", f"--path={path}", f"--workdir={tmp_path / 'run'}", *few_ids]
    assert message in _refusal(import_torch.main, flags, monkeypatch, capsys)


@pytest.mark.parametrize("inner", ["", "consolidated"])
def test_the_tokenizer_beside_the_weights_comes_first(inner, tmp_path):
    params, folders = {}, [tmp_path / name for name in ("moved", "recorded")]
    for folder, words in zip(folders, ("some words of a text", "decoys lie at old paths")):
        (folder / "consolidated").mkdir(parents=True)
        train_sentencepiece([words * 9], folder / "consolidated" / "tokenizer.model", 290)
    recorded = folders[1] / "consolidated" / "tokenizer.model"
    params = {"data": {"tokenizer": {"name": "sp", "path": str(recorded)}}}
    (folders[0] / "consolidated" / "params.json").write_text(json.dumps(params))
    beside = folders[0] / "consolidated" / "tokenizer.model"
    found = find_tokenizer("official", folders[0] / inner, TokenizerChoice())
    assert found.source == beside.read_bytes() != recorded.read_bytes()
    beside.unlink()
    found = find_tokenizer("official", folders[0] / inner, TokenizerChoice())
    assert found.source == recorded.read_bytes()


class _Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def _refusal(main, flags, monkeypatch, capsys):
    """The one line on stderr of a refused input."""
    monkeypatch.setattr(sys, "argv", ["program", *flags])
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        cli.run(main)
    error = capsys.readouterr().err
    assert (left.value.code, error.count("\n")) == (1, 1), error
    assert error.startswith("error: ")
    return error


WQ = "lm_transformer.layers.0.attention.wq.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, t: t.pop("stem_embeddings.1.weight"), "stem_embeddings.1.weight is missing"),
        (lambda p, t: t.update({"rope": t[WQ]}), "rope is unknown"),
        (lambda p, t: t.update({WQ: t[WQ][:5].clone()}), "wq.weight is (5, 96), expected (96, 96)"),
        (lambda p, t: t.update({WQ: t[WQ].double()}), "wq.weight has dtype torch.float64"),
        (
            lambda p, t: t[WQ].fill_(float("nan")),
            f"{WQ} (blocks.0.attention.q_proj.kernel here) has",
        ),
        (
            lambda p, t: t["stem_embeddings.2.weight"][9].fill_(1e999),
            "stem_embeddings.2.weight (table 2 here) has rows that",
        ),
        (lambda p, t: p["model"].pop("dim"), "params.json: model: dim is missing; give"),
        (lambda p, t: p["model"].update(sliding_window=8), "model.sliding_window=8 is not"),
        (lambda p, t: p["model"].update(n_heads=5, head_dim=16), "wq.weight is (96, 96), expected"),
        (lambda p, t: p["model"].update(vocab_size=2), "tok_embeddings.weight is (257, 96)"),
        (lambda p, t: p.update(model=None), "params.json: model is null; give the file"),
        (
            lambda p, t: p["model"].update(n_heads=0, head_dim=None),
            "n_heads is 0, expected",
        ),
        (lambda p, t: p["model"].update(n_heads=99, head_dim=None), "gives 99 heads of a width of"),
        (lambda p, t: p["model"].update(n_layers=10**9), "gives 1000000000 layers, there are"),
        (lambda p, t: p["model"].update(norm_eps=True), "norm_eps is true, expected a number"),
        (lambda p, t: p["model"].update(weight_tying="false"), "weight_tying is 'false', expected"),
        (lambda p, t: p["model"].update(max_seqlen=1.5), "max_seqlen is 1.5, expected a whole"),
        (lambda p, t: t.update({WQ: t[WQ].to_sparse()}), "wq.weight is a sparse_coo tensor; save"),
        (lambda p, t: t.update({WQ: t[WQ].to("meta")}), "wq.weight is a meta tensor; save it as"),
        (lambda p, t: t.update({WQ: [1.0]}), "wq.weight is not a tensor; remove it"),
    ],
)
def test_bad_official_checkpoints(change, message, few_ids, tmp_path, monkeypatch, capsys):
    path = write_official(tmp_path / "source", "stem_gqa", change)
    flags = ["--from=official", f"--path={path}", f"--workdir={tmp_path / 'run'}", *few_ids]
    assert message in _refusal(import_torch.main, flags, monkeypatch, capsys)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_code_in_a_file_is_not_run(few_ids, tmp_path, monkeypatch, capsys):
    path = write_official(tmp_path / "source", "stem_gqa")
    flags = ["--from=official", f"--path={path}", f"--workdir={tmp_path / 'run'}", *few_ids]
    trap = tmp_path / "source" / "trap"
    for save in (torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))):
        save({"model": _Malice(trap)}, path / "consolidated" / "consolidated.pth")
        error = _refusal(import_torch.main, flags, monkeypatch, capsys)
        assert "cannot be read as tensors alone" in error
        assert "weights_only" not in error
        assert ("(it asks for getattr)" in error) == (save is torch.save)
    assert not trap.exists()


def _edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def _edit_tensors(change):
    def edit(folder):
        [path] = folder.glob("*00001-of*")
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        safetensors.torch.save_file(tensors, path)

    return edit


def _cut(folder):
    [path] = folder.glob("*00002-of*")
    path.write_bytes(path.read_bytes()[:-100])


EMBED = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: next(f.glob("*00002-of*")).unlink(), "missing in"),
        (_cut, "file not fully covered); copy it again"),
        (lambda f: next(f.glob("*00001-of*")).write_bytes(b"x" * 50), "not a safetensors file"),
        (lambda f: next(f.glob("*00001-of*")).write_bytes(b""), "is not a safetensors file"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text("{}"),
            "weight_map is missing",
        ),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "has neither model.safetensors"),
        (_edit_tensors(lambda t: t.update({EMBED: t.pop(EMBED).int()})), "has dtype I32; convert"),
        (_edit_tensors(lambda t: t.pop(EMBED)), f"places {EMBED} in"),
        (lambda f: (f / "config.json").unlink(), "config.json cannot be read (No such file"),
        (lambda f: (f / "adapter_config.json").touch(), "an adapter that is not read; merge it"),
        (_edit_config(model_type="mistral"), "holds a model of type 'mistral'"),
        (_edit_config(attention_bias=True), "attention_bias=True, only False"),
        (_edit_config(hidden_act="gelu"), "hidden_act='gelu', only 'silu'"),
        (_edit_config(rope_parameters={"rope_type": "dynamic"}), "rotary scaling 'dynamic'"),
        (
            _edit_config(
                rope_parameters={
                    "rope_type": "llama3",
                    "factor": 2.0,
                    "low_freq_factor": 2.0,
                    "original_max_position_embeddings": 16,
                }
            ),
            "low_freq_factor=2.0 in its rotary scaling",
        ),
        (_edit_config(rope_parameters={"rope_type": "yarn"}), "rope_parameters: factor is missing"),
        (_edit_config(rope_parameters=[1.0]), "rope_parameters is [1.0], expected an object"),
        (_edit_config(num_attention_heads=0, head_dim=None), "num_attention_heads is 0, expected"),
        (_edit_config(num_attention_heads=0, head_dim=8), "num_attention_heads is 0, expected"),
        (_edit_config(num_hidden_layers="3"), "num_hidden_layers is '3', expected a whole"),
        (_edit_config(bos_token_id=1), "bos is token 256, config.json of the model has bos_token"),
        (_edit_config(eos_token_id=[1, 2]), "has eos_token_id=1 or 2: it is not the one"),
        (_edit_config(eos_token_id="</s>"), "has eos_token_id='</s>', expected token ids"),
        (_edit_config(num_hidden_layers=4), "model.layers.3.input_layernorm.weight is missing"),
        (_edit_config(num_hidden_layers=2), "model.layers.2.input_layernorm.weight is unknown"),
        (_edit_config(intermediate_size=50), "gate_proj.weight is (48, 32), expected (50, 32)"),
        (_edit_config(tie_word_embeddings=True), "lm_head.weight differs from"),
    ],
)
def test_bad_llamas(spoil, message, tmp_path, monkeypatch, capsys):
    folder = write_llama(tmp_path / "llama", "gqa", max_shard_size="40KB")
    spoil(folder)
    flags = ["--from=llama", f"--path={folder}", f"--workdir={tmp_path / 'run'}"]
    flags += ["--tokenizer=bytes"]
    assert message in _refusal(import_torch.main, flags, monkeypatch, capsys)
    assert [entry.name for entry in tmp_path.iterdir()] == ["llama"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "has no tokenizer; give the one"),
        (["--tokenizer=bytes", "--config.model.ffn_dim=9"], "the model has 48; leave the flag out"),
        (
            ["--tokenizer=bytes", "--config.model.token_embedding_dropout=0.3"],
            "the model has 0.0; leave the flag out",
        ),
        (
            ["--tokenizer=bytes", "--config.model.stem_site=gate"],
            "the model has up; leave the flag out",
        ),
        (
            ["--tokenizer=bytes", "--config.value.layers=0"],
            "value.layers=(0,) is a memory that the imported model has not",
        ),
        (["--tokenizer=bytes", "--path=nowhere"], "--path=nowhere is not a folder"),
        (["--tokenizer=bytes", "--workdir=."], "--workdir=. exists; choose another name"),
        (["--tokenizer=bytes", "--config.model.ffn=9"], "unknown config key model.ffn"),
    ],
)
def test_bad_flags(flags, message, tmp_path, monkeypatch, capsys):
    folder = write_llama(tmp_path / "llama", "gqa")
    flags = ["--from=llama", f"--path={folder}", f"--workdir={tmp_path / 'run'}", *flags]
    assert message in _refusal(import_torch.main, flags, monkeypatch, capsys)


@pytest.mark.parametrize(("key", "value"), [("hash_moe_layers", (0,)), ("stem_site", "gate")])
def test_a_config_file_of_another_kind_of_model(key, value, tmp_path, monkeypatch, capsys):
    config = tmp_path / "other.py"
    config.write_text(
        "from configs.base import get_config as base\n\n\ndef get_config():\n"
        f"    config = base()\n    config.model.{key} = {value!r}\n    return config\n"
    )
    folder = write_llama(tmp_path / "llama", "gqa")
    flags = ["--from=llama", f"--path={folder}", f"--workdir={tmp_path / 'run'}"]
    flags += ["--tokenizer=bytes", f"--config={config}"]
    error = _refusal(import_torch.main, flags, monkeypatch, capsys)
    assert f"{config} has model.{key}={value}, which the imported model is not" in error


def test_a_tokenizer_with_too_many_ids(tmp_path, few_ids, monkeypatch, capsys):
    path = write_official(tmp_path / "source", "stem_gqa")
    flags = ["--from=official", f"--path={path}", f"--workdir={tmp_path / 'run'}"]
    error = _refusal(import_torch.main, [*flags, "--tokenizer=bytes"], monkeypatch, capsys)
    assert "the tokenizer has 258 ids, the model 257" in error


def test_official_has_no_rotary_scaling(tmp_path, monkeypatch, capsys):
    folder = write_llama(tmp_path / "llama", "llama3")
    flags = ["--from=llama", f"--path={folder}", f"--workdir={tmp_path / 'run'}"]
    import_torch.main([*flags, "--tokenizer=bytes"])
    flags = [f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", "--format=official"]
    error = _refusal(export.main, flags, monkeypatch, capsys)
    assert "model.rope_scaling=llama3 has no counterpart" in error


@pytest.mark.parametrize("ids", [{"bos_token_id": None}, {"eos_token_id": [9, 257]}])
def test_special_ids_that_fit(ids, tmp_path):
    folder = write_llama(tmp_path / "llama", "gqa")
    _edit_config(**ids)(folder)
    flags = ["--from=llama", f"--path={folder}", f"--workdir={tmp_path / 'run'}"]
    import_torch.main([*flags, "--tokenizer=bytes"])
    assert (tmp_path / "run" / "config.json").exists()


def test_another_tokenizer_than_that_of_the_export(few_ids, tmp_path, monkeypatch, capsys):
    folder = write_llama(tmp_path / "llama", "gqa")
    BYTES.save(folder / "native_tokenizer")
    flags = ["--from=hf", f"--path={folder}", f"--workdir={tmp_path / 'run'}"]
    error = _refusal(import_torch.main, [*flags, *few_ids], monkeypatch, capsys)
    assert f"the model was exported with {BYTES.fingerprint[:12]}" in error
    import_torch.main([*flags, "--tokenizer=bytes"])
