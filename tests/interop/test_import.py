"""Imports: what PyTorch says with its weights is what we say, and the way back gives its bits."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

from stem_jax import export, generate, import_torch, train
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.loading import load_run
from stem_jax.checkpoints.saved_model import open_saved_model
from stem_jax.mesh import make_mesh
from stem_jax.training.blueprint import Blueprint
from stem_jax.training.state import abstract_state, init_state
from tests.saved_models import BYTES, SIZES, logits, save_run, trained_state

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
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


def write_official(folder, name, change=None):
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


def few_ids_flags(folder):
    """The flags of a tokenizer with few ids, for models of any vocabulary."""
    path = folder / "t.json"
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[])).save(str(path))
    return ["--tokenizer=hf", f"--tokenizer-path={path}", "--bos=<s>", "--eos=</s>"]


@pytest.fixture(scope="module")
def few_ids(tmp_path_factory):
    return few_ids_flags(tmp_path_factory.mktemp("tokenizer"))


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


# stem_gqa is as stem_small, with fewer heads for keys and values.
@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.long) for name in MODELS[:2]), MODELS[2]]
)
def test_stored_weights(name, few_ids, tmp_path):
    source, stored = write_official(tmp_path / "source", name), _stored(name)
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


@pytest.mark.parametrize("kind", [pytest.param("hf", marks=pytest.mark.long), "official"])
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


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizer_begins_as_in_training(name, trained, tmp_path):
    out = _export("hf", trained, tmp_path / "out")
    _import("hf", out, tmp_path / "again", f"--config.optimizer.name={name}")
    with Checkpointer(tmp_path / "again", read_only=True) as checkpoints:
        config = checkpoints.info(0).config
        config = dataclasses.replace(config, mesh=config.mesh.on_one_device())
        blueprint = Blueprint(config, make_mesh(config.mesh, jax.devices()[:1]))
        found = checkpoints.restore(0, abstract_state(blueprint))
    begun = init_state(blueprint)
    leaves = jax.tree.leaves(found.opt_state)
    assert len(leaves) > 10 and any(leaf.size > 1000 for leaf in leaves)
    jax.tree.map(np.testing.assert_array_equal, found.opt_state, begun.opt_state)
    table = found.tables["stem"]
    assert np.asarray(table.rows).any()
    for field in ("mu", "nu", "last_step"):
        assert not np.asarray(getattr(table, field)).any()


@pytest.mark.long
def test_a_new_run_begins_with_it(trained, tmp_path):
    out = _export("hf", trained, tmp_path / "out")
    again = _import("hf", out, tmp_path / "again", "--config.tables.pad_multiple=32")
    begun = {
        "train.init_from": tmp_path / "again",
        "train.steps": 1,
        "train.seq_len": 32,
        "train.global_batch_size": 8,
        "train.sample_prompt": "",
        "optimizer.learning_rate": 1e-6,
        "optimizer.warmup_steps": 0,
        "tables.lr_multiplier": 1.0,
        "tables.pad_multiple": 32,
        "data.sources": "facts",
        "data.tokenizer": "bytes",
        "eval.every": 0,
        "eval.max_batches": 1,
        "eval.baselines": False,
        "mesh.data": -1,
    }
    config = dataclasses.asdict(again.config.model) | {"attention": "auto"}
    # No layer of a kind is written as none.
    sizes = {f"model.{name}": "none" if value == () else value for name, value in config.items()}
    flags = [f"--config.{key}={value}" for key, value in (sizes | begun).items()]
    train.main(["--config=configs/base.py", f"--workdir={tmp_path / 'new'}", *flags])
    run = load_run(tmp_path / "new")
    assert run.step == 1
    for name, value in again.params.items():
        # One step moves a parameter by about the learning rate: it began with that of the import.
        np.testing.assert_allclose(run.params[name], value, atol=1e-5, rtol=0)
    np.testing.assert_allclose(run.rows["stem"].rows, again.rows["stem"].rows, atol=1e-5, rtol=0)
    changed = [not np.array_equal(run.params[name], again.params[name]) for name in again.params]
    assert any(changed)


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


def write_llama(folder, name, dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=BYTES.bos_id,
        eos_token_id=BYTES.eos_id,
        **LLAMAS[name],
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, **options)
    return folder


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("name", LLAMAS)
def test_llama(name, shard, tmp_path):
    folder = write_llama(tmp_path / "llama", name, max_shard_size=shard)
    assert (folder / "model.safetensors").exists() == (shard == "1GB")
    run = _import("llama", folder, tmp_path / "run", "--tokenizer=bytes")
    tokens = np.random.default_rng(0).integers(0, 258, (2, 40))
    theirs = _their_logits(folder, tokens)
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(logits(run, tokens), theirs, atol=LOGITS, rtol=0)
    assert run.config.train.seq_len == 64
    out = _export("hf", tmp_path / "run", tmp_path / "out")
    np.testing.assert_allclose(_their_logits(out, tokens), theirs, atol=1e-6, rtol=0)


def test_a_tied_head_alone(tmp_path):
    folder = write_llama(tmp_path / "llama", "tied")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    embedding = tensors.pop("model.embed_tokens.weight")
    tokens = np.random.default_rng(0).integers(0, 258, (2, 40))
    expected = _their_logits(folder, tokens)
    both = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    for name, there in (("alone", {"lm_head.weight": embedding}), ("both", both)):
        safetensors.torch.save_file(tensors | there, folder / "model.safetensors", {"format": "pt"})
        np.testing.assert_array_equal(_their_logits(folder, tokens), expected)
        run = _import("llama", folder, tmp_path / name, "--tokenizer=bytes")
        np.testing.assert_allclose(logits(run, tokens), expected, atol=LOGITS, rtol=0)


def test_a_folder_saved_again(tmp_path, capsys):
    folder = write_llama(tmp_path / "llama", "gqa", max_shard_size="20KB")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.1
    before = list(folder.glob("model-*-of-*.safetensors"))
    model.save_pretrained(folder)
    # Their index stays behind; without them it names nothing.
    assert before
    assert (folder / "model.safetensors.index.json").exists()
    tokens = np.random.default_rng(0).integers(0, 258, (2, 40))
    theirs = _their_logits(folder, tokens)
    run = _import("llama", folder, tmp_path / "run", "--tokenizer=bytes")
    np.testing.assert_allclose(logits(run, tokens), theirs, atol=LOGITS, rtol=0)
    assert "the single file is read, as transformers does" in capsys.readouterr().err


def test_half_precision_comes_back(tmp_path):
    folder = write_llama(tmp_path / "llama", "gqa", torch.bfloat16)
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
