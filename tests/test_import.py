"""Imports: what PyTorch says with its weights is what we say, and the way back gives its bits."""

import functools
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from saved_models import BYTES, SIZES, logits, save_run, trained_state

from configs.base import get_config as base_config
from stem_jax import cli, export, generate, import_torch
from stem_jax.config import build
from stem_jax.interop.saved_model import open_saved_model
from stem_jax.loading import load_run
from stem_jax.origin import find_origin

GOLDEN = Path(__file__).parent / "data" / "golden"
MODELS = ["stem_small", "stem_gqa", "dense_small"]
# As in test_parity for the stored ones; other models are trained or drawn here.
STORED, LOGITS = 2e-5, 1e-4


@functools.cache
def _stored(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def _tensors(name):
    return {
        key: torch.from_numpy(value.copy())
        for key, value in _stored(name).items()
        if key.endswith(".weight") and "/" not in key
    }


def _write_official(folder, name, change=None):
    """A checkpoint as the official code consolidates it, with the stored weights."""
    params = {
        "model": json.loads((GOLDEN / f"{name}.json").read_text())["model"],
        "distributed": {"model_dtype": "fp32"},
        "data": {"tokenizer": {"name": "tiktoken", "path": "/elsewhere/tokenizer.model"}},
    }
    tensors = _tensors(name)
    if change is not None:
        change(params, tensors)
    folder = folder / "consolidated"
    folder.mkdir(parents=True)
    tables = {key: value for key, value in tensors.items() if key.startswith("stem_")}
    backbone = {key: value for key, value in tensors.items() if key not in tables}
    torch.save({"model": backbone}, folder / "consolidated.pth")
    if tables:
        torch.save(tables, folder / "consolidated_stem.pth")
    (folder / "params.json").write_text(json.dumps(params))
    return folder.parent


@pytest.fixture(scope="module")
def few_ids(tmp_path_factory):
    """The flags of a tokenizer with few ids, for models of any vocabulary."""
    path = tmp_path_factory.mktemp("tokenizer") / "t.json"
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[])).save(str(path))
    return ["--tokenizer=hf", f"--tokenizer-path={path}"]


def _import(kind, path, workdir, *flags):
    import_torch.main([f"--from={kind}", f"--path={path}", f"--workdir={workdir}", *flags])
    return load_run(workdir)


def _export(kind, workdir, out, *flags):
    export.main([f"--workdir={workdir}", f"--format={kind}", f"--out={out}", *flags])
    return out


def _their_logits(folder, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens).long()).logits.float().numpy()


@pytest.mark.parametrize("name", MODELS)
def test_stored_weights(name, few_ids, tmp_path):
    source, stored = _write_official(tmp_path / "source", name), _stored(name)
    run = _import("official", source, tmp_path / "run", *few_ids)
    ours = logits(run, stored["tokens"])
    np.testing.assert_allclose(ours, stored["logits"], atol=STORED, rtol=0)
    folder = _export("hf", tmp_path / "run", tmp_path / "hf", "--no-tokenizer")
    theirs = _their_logits(folder, stored["tokens"])
    np.testing.assert_allclose(theirs, stored["logits"], atol=STORED, rtol=0)
    _import("hf", folder, tmp_path / "again", *few_ids)
    for workdir in ("run", "again"):
        out = _export("official", tmp_path / workdir, tmp_path / f"{workdir}_out", "--no-tokenizer")
        _same_as_stored(out / "consolidated", name, by_way_of_hf=workdir == "again")
    # The tables are in both files, so either is enough.
    (out / "consolidated" / "consolidated_stem.pth").unlink(missing_ok=True)
    third = _import("official", out / "consolidated", tmp_path / "third", *few_ids)
    np.testing.assert_array_equal(logits(third, stored["tokens"]), ours)


def _same_as_stored(folder, name, by_way_of_hf):
    tensors, params = _tensors(name), json.loads((folder / "params.json").read_text())
    found = torch.load(folder / "consolidated.pth", weights_only=True)["model"]
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    tables = {key for key in tensors if key.startswith("stem_")}
    assert (folder / "consolidated_stem.pth").exists() == bool(tables)
    if tables:
        alone = torch.load(folder / "consolidated_stem.pth", weights_only=True)
        assert alone.keys() == tables
        assert all(torch.equal(alone[key], tensors[key]) for key in tables)
    notes = json.loads((GOLDEN / f"{name}.json").read_text())
    # The official formula for F.
    model, third = params["model"], int(2 * 4 * params["model"]["dim"] / 3)
    width = int((model["ffn_dim_multiplier"] or 1) * third)
    multiple = model["multiple_of"]
    assert multiple * -(-width // multiple) == notes["derived"]["hidden_dim"]
    derived = {"head_dim", "n_kv_heads", "ffn_dim_multiplier", "multiple_of", "seed"}
    if by_way_of_hf:
        derived |= {"init_std_factor", "init_base_std"}
    for key in notes["model"].keys() - derived:
        assert model[key] == notes["model"][key], key
    assert params["distributed"] == {"model_dtype": "fp32"}


@pytest.fixture(scope="module")
def trained(train_step, make_batch, tmp_path_factory):
    """The work folder of a trained STEM model with the bytes tokenizer."""
    step, folder = train_step(**SIZES), tmp_path_factory.mktemp("trained")
    save_run(folder, step, trained_state(step, make_batch))
    return folder


@pytest.mark.parametrize("kind", ["hf", "official"])
def test_there_and_back(kind, trained, tmp_path, capsys):
    out = _export(kind, trained, tmp_path / "out")
    again = _import(kind, out, tmp_path / "again")
    tokens = np.random.default_rng(0).integers(0, 258, (2, 30))
    before, saved = load_run(trained), open_saved_model(trained)
    np.testing.assert_array_equal(logits(again, tokens), logits(before, tokens))
    assert (again.step, again.tokenizer.fingerprint) == (0, BYTES.fingerprint)
    assert again.config.model == before.config.model
    assert again.config.train.seq_len == saved.config.train.seq_len
    texts = []
    for workdir in (trained, tmp_path / "again"):
        capsys.readouterr()
        generate.main([f"--workdir={workdir}", "--prompt=one", "--greedy", "--max-new-tokens=9"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(texts[0]) > len("one\n")


def test_a_new_run_begins_with_it(trained, tmp_path):
    out = _export("hf", trained, tmp_path / "out")
    _import("hf", out, tmp_path / "again", "--config.tables.pad_multiple=32")
    raw = base_config().to_dict()
    config = load_run(tmp_path / "again").config
    for name in raw["model"]:
        raw["model"][name] = getattr(config.model, name)
    raw["model"]["attention"] = "auto"
    raw["tables"]["pad_multiple"] = 32
    raw["data"]["tokenizer"] = "bytes"
    raw["train"]["init_from"] = str(tmp_path / "again")
    origin = find_origin(build(raw))
    assert (origin.info.step, origin.info.tokenizer) == (0, BYTES.fingerprint)


LLAMAS = {
    "gqa": {"num_key_value_heads": 2},
    "tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "head_dim": {"num_key_value_heads": 1, "head_dim": 20, "rope_theta": 5e5},
    "llama3": {
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}


def _write_llama(folder, name, dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        **LLAMAS[name],
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, **options)
    return folder


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("name", LLAMAS)
def test_llama(name, shard, tmp_path):
    folder = _write_llama(tmp_path / "llama", name, max_shard_size=shard)
    assert (folder / "model.safetensors").exists() == (shard == "1GB")
    run = _import("llama", folder, tmp_path / "run", "--tokenizer=bytes")
    tokens = np.random.default_rng(0).integers(0, 258, (2, 40))
    theirs = _their_logits(folder, tokens)
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(logits(run, tokens), theirs, atol=LOGITS, rtol=0)
    assert run.config.train.seq_len == 64
    out = _export("hf", tmp_path / "run", tmp_path / "out")
    np.testing.assert_allclose(_their_logits(out, tokens), theirs, atol=1e-6, rtol=0)


def test_half_precision_comes_back(tmp_path):
    folder = _write_llama(tmp_path / "llama", "gqa", torch.bfloat16)
    run = _import("llama", folder, tmp_path / "run", "--tokenizer=bytes")
    assert {value.dtype.name for value in run.params.values()} == {"float32"}
    out = _export("hf", tmp_path / "run", tmp_path / "out", "--dtype=bfloat16")
    before, after = (
        safetensors.torch.load_file(path / "model.safetensors") for path in (folder, out)
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    official = _export("official", tmp_path / "run", tmp_path / "official", "--dtype=bfloat16")
    again = _import("official", official, tmp_path / "again")
    assert all(np.array_equal(again.params[name], run.params[name]) for name in run.params)


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
        (lambda p, t: t[WQ].fill_(float("nan")), "q_proj.kernel has values that are not finite"),
        (lambda p, t: t["stem_embeddings.2.weight"][9].fill_(1e999), "table 2 has rows that"),
        (lambda p, t: p["model"].pop("dim"), "params.json lacks model.'dim'"),
        (lambda p, t: p["model"].update(sliding_window=8), "model.sliding_window=8 is not"),
        (lambda p, t: p["model"].update(n_heads=5, head_dim=16), "wq.weight is (96, 96), expected"),
        (lambda p, t: p["model"].update(vocab_size=2), "tok_embeddings.weight is (257, 96)"),
        (lambda p, t: p.update(model=None), "params.json lacks model"),
    ],
)
def test_bad_official_checkpoints(change, message, few_ids, tmp_path, monkeypatch, capsys):
    path = _write_official(tmp_path / "source", "stem_gqa", change)
    flags = ["--from=official", f"--path={path}", f"--workdir={tmp_path / 'run'}", *few_ids]
    assert message in _refusal(import_torch.main, flags, monkeypatch, capsys)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_code_in_a_file_is_not_run(few_ids, tmp_path, monkeypatch, capsys):
    path = _write_official(tmp_path / "source", "stem_gqa")
    flags = ["--from=official", f"--path={path}", f"--workdir={tmp_path / 'run'}", *few_ids]
    trap = tmp_path / "source" / "trap"
    for save in (torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))):
        save({"model": _Malice(trap)}, path / "consolidated" / "consolidated.pth")
        error = _refusal(import_torch.main, flags, monkeypatch, capsys)
        assert "cannot be read as tensors alone" in error
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
        (_cut, "cut short: copy it again"),
        (lambda f: next(f.glob("*00001-of*")).write_bytes(b"x" * 50), "not a safetensors file"),
        (lambda f: next(f.glob("*00001-of*")).write_bytes(b""), "is not a safetensors file"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "is not an index"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "has neither model.safetensors"),
        (_edit_tensors(lambda t: t.update({EMBED: t.pop(EMBED).int()})), "has dtype I32; convert"),
        (_edit_tensors(lambda t: t.pop(EMBED)), f"places {EMBED} in"),
        (lambda f: (f / "config.json").unlink(), "has no readable config.json"),
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
        (_edit_config(rope_parameters={"rope_type": "yarn"}), "config.json: KeyError 'factor'"),
        (_edit_config(num_hidden_layers=4), "model.layers.3.input_layernorm.weight is missing"),
        (_edit_config(num_hidden_layers=2), "model.layers.2.input_layernorm.weight is unknown"),
        (_edit_config(intermediate_size=50), "gate_proj.weight is (48, 32), expected (50, 32)"),
        (_edit_config(tie_word_embeddings=True), "lm_head.weight differs from"),
    ],
)
def test_bad_llamas(spoil, message, tmp_path, monkeypatch, capsys):
    folder = _write_llama(tmp_path / "llama", "gqa", max_shard_size="40KB")
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
        (["--tokenizer=bytes", "--path=nowhere"], "--path=nowhere is not a folder"),
        (["--tokenizer=bytes", "--workdir=."], "--workdir=. exists; choose a new folder"),
        (["--tokenizer=bytes", "--config.model.ffn=9"], "unknown config key model.ffn"),
    ],
)
def test_bad_flags(flags, message, tmp_path, monkeypatch, capsys):
    folder = _write_llama(tmp_path / "llama", "gqa")
    flags = ["--from=llama", f"--path={folder}", f"--workdir={tmp_path / 'run'}", *flags]
    assert message in _refusal(import_torch.main, flags, monkeypatch, capsys)


def test_a_tokenizer_with_too_many_ids(tmp_path, few_ids, monkeypatch, capsys):
    path = _write_official(tmp_path / "source", "stem_gqa")
    flags = ["--from=official", f"--path={path}", f"--workdir={tmp_path / 'run'}"]
    error = _refusal(import_torch.main, [*flags, "--tokenizer=bytes"], monkeypatch, capsys)
    assert "the tokenizer has 258 ids, the model 257" in error


def test_official_has_no_rotary_scaling(tmp_path, monkeypatch, capsys):
    folder = _write_llama(tmp_path / "llama", "llama3")
    _import("llama", folder, tmp_path / "run", "--tokenizer=bytes")
    flags = [f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", "--format=official"]
    error = _refusal(export.main, flags, monkeypatch, capsys)
    assert "model.rope_scaling=llama3 has no counterpart" in error
