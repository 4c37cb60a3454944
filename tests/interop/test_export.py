"""Exports: what PyTorch says with our weights is what we say, and nothing is half-written."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from stem_jax import cli, export, train
from stem_jax.checkpoints import saved_model
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.loading import load_run
from stem_jax.checkpoints.saved_model import SavedModel, open_saved_model
from stem_jax.data.sentencepiece_training import train_sentencepiece
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.errors import InputError
from stem_jax.interop.hf_export import export_hf
from stem_jax.interop.stem_attention import CACHE
from stem_jax.tables.spec import logical
from tests.saved_models import (
    BYTES,
    CONTEXT,
    SIZES,
    UPDATES,
    greedy,
    logits,
    run_folders,
    save_run,
    trained_state,
)

LOGITS = 1e-4
# With bos: 4, 10 and 21 tokens.
PROMPTS = ["abc", "one more.", "a longer prompt: 123"]
# Rotary factors are not the context over the original one, from which they could be guessed.
MODELS = {
    "stem_gqa": {"model.head_dim": 10, "model.norm_eps": 1e-3},
    "stem_tied": {
        "model.tie_embeddings": True,
        "model.num_kv_heads": 4,
        "model.rope_theta": 5e5,
        "model.rope_scaling": "llama3",
        "model.rope_factor": 4.0,
        "model.rope_original_len": 16,
    },
    "dense": {"model.stem_layers": "none"},
    "dense_tied": {
        "model.stem_layers": "none",
        "model.tie_embeddings": True,
        "model.rope_scaling": "yarn",
        "model.rope_factor": 4.0,
        "model.rope_original_len": 16,
    },
}
OFFLOADABLE = """
    --config=configs/tiny.py --config.model.vocab_size=320 --config.model.embed_dim=32
    --config.model.num_layers=1 --config.model.stem_layers=0 --config.model.num_heads=4
    --config.model.ffn_dim=48
    --config.data.tokenizer=bytes --config.data.sources=facts --config.train.steps=6
    --config.train.seq_len=16 --config.train.sample_prompt= --config.eval.max_batches=1
    --config.eval.baselines=false --config.tables.prefetch=1
""".split()


@pytest.fixture(scope="module")
def run_folder(train_step, make_batch, tmp_path_factory):
    """run_folder(name): the work folder of a trained model."""
    return run_folders(MODELS, train_step, make_batch, tmp_path_factory)


@pytest.fixture(scope="module")
def exported(run_folder, tmp_path_factory):
    """exported(name): the folder of an export for transformers."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("exports") / name
            flags = [f"--workdir={run_folder(name)}", f"--out={made[name]}", "--format=hf"]
            export.main([*flags, "--file-gib=0.0001"])
        return made[name]

    return make


def _load(folder, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, **options
    )
    return model.eval()


def _ids(prompts=PROMPTS):
    return [[BYTES.bos_id, *BYTES.encode(prompt)] for prompt in prompts]


def _left_padded(ids):
    longest = max(map(len, ids))
    pads = [longest - len(one) for one in ids]
    tokens = [[7] * pad + one for pad, one in zip(pads, ids, strict=True)]
    mask = [[0] * pad + [1] * len(one) for pad, one in zip(pads, ids, strict=True)]
    return torch.tensor(tokens), torch.tensor(mask)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_logits(name, attention, exported, run_folder):
    model = _load(exported(name), attn_implementation=attention)
    tokens = np.random.default_rng(0).integers(0, 258, (3, 40))
    ours = logits(load_run(run_folder(name)), tokens)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(ours).max() > 1
    np.testing.assert_allclose(theirs, ours, atol=LOGITS, rtol=0)
    kind = "Stem" if name.startswith("stem") else "Llama"
    assert type(model).__name__ == f"{kind}ForCausalLM"
    assert (exported(name) / "modeling_stem.py").exists() == (kind == "Stem")


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation(name, exported, run_folder):
    ours = greedy(load_run(run_folder(name)), _ids(), 64)
    tokens, mask = _left_padded(_ids())
    theirs = _load(exported(name)).generate(
        tokens, attention_mask=mask, max_new_tokens=64, do_sample=False
    )
    assert [len(one) for one in ours] == [64] * 3
    assert len({tuple(one) for one in ours}) == 3
    assert theirs[:, tokens.shape[1] :].tolist() == ours


def test_the_export_stands_alone(exported, tmp_path):
    """Another process loads it, with nothing of ours to import."""
    program = (
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(\n"
        "    sys.argv[1], trust_remote_code=True, table_device='cpu')\n"
        "print(model(torch.tensor([[256, 97]])).logits.shape[-1])\n"
        "assert not {'jax', 'stem_jax'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, exported("stem_gqa")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "258\n"), done.stderr


def test_padding_changes_nothing(exported):
    model = _load(exported("stem_gqa"))
    tokens, mask = _left_padded(_ids())
    with torch.no_grad():
        together = model(tokens, attention_mask=mask).logits[:, -1]
        other = torch.where(mask.bool(), tokens, 99)
        assert torch.equal(model(other, attention_mask=mask).logits[:, -1], together)
        for row, ids in zip(together, _ids(), strict=True):
            alone = model(torch.tensor([ids])).logits[0, -1]
            torch.testing.assert_close(row, alone, atol=1e-5, rtol=0)


def test_cached_steps_are_the_whole_forward(exported):
    model = _load(exported("stem_tied"))
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 258, (2, 12)))
    with torch.no_grad():
        whole = model(tokens).logits
        output, pieces = None, []
        for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:]):
            cache = {} if output is None else {CACHE: output[CACHE]}
            output = model(part, use_cache=True, **cache)
            pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=0)


def test_tables_stay_on_their_device(exported):
    free, pinned = _load(exported("stem_gqa")), _load(exported("stem_gqa"), table_device="cpu")
    tokens, mask = _left_padded(_ids())
    with torch.no_grad():
        assert torch.equal(
            free(tokens, attention_mask=mask).logits, pinned(tokens, attention_mask=mask).logits
        )
    # The device "meta" stands for an accelerator: it shows where `to` sends what.
    before = pinned.model.layers[0].mlp.up_table.weight.clone()
    pinned.to("meta")
    places = {name: value.device.type for name, value in pinned.named_parameters()}
    tables = {name for name, place in places.items() if place == "cpu"}
    assert tables == {f"model.layers.{layer}.mlp.up_table.weight" for layer in (0, 2)}
    pinned.to(torch.bfloat16)
    table = pinned.model.layers[0].mlp.up_table.weight
    assert table.device.type == "cpu"
    assert torch.equal(table, before.bfloat16())
    free.to("meta")
    assert {value.device.type for value in free.parameters()} == {"meta"}


def test_device_map_with_table_device(exported):
    model = _load(exported("stem_gqa"), table_device="cpu", device_map="cpu")
    assert {value.device.type for value in model.parameters()} == {"cpu"}
    with pytest.raises(ValueError, match="device_map='auto' cannot be had with table_device='cpu'"):
        _load(exported("stem_gqa"), table_device="cpu", device_map="auto")


def test_loss_and_gradients(exported):
    model = _load(exported("stem_gqa"))
    tokens = torch.tensor(_ids()[:1])
    output = model(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], tokens[0, 1:])
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    touched = model.model.layers[2].mlp.up_table.weight.grad.abs().sum(-1) > 0
    # The last token is read, but predicts nothing.
    assert touched.nonzero()[:, 0].tolist() == sorted({*_ids()[0][:-1]})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(inputs_embeds=torch.zeros(1, 2, 32)), "input_ids are missing: STEM layers"),
        (lambda m: m(torch.zeros(1, CONTEXT + 1, dtype=int)), "129 tokens .*_embeddings=128 "),
        (
            lambda m: m(torch.zeros(1, 3, dtype=int), attention_mask=torch.ones(1, 2)),
            r"attention_mask is \(1, 2\); it must be \(1, 3\)",
        ),
        (lambda m: m.resize_token_embeddings(300), "the vocabulary cannot change"),
    ],
)
def test_calls_that_are_refused(call, message, exported):
    with pytest.raises(ValueError, match=message):
        call(_load(exported("stem_gqa")))


def test_transformers_saves_it_again(exported, tmp_path):
    model = _load(exported("stem_tied"), table_device="cpu")
    model.save_pretrained(tmp_path)
    again, tokens = _load(tmp_path), torch.tensor(_ids()[:1])
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_rows_are_caught_up(run_folder):
    saved, run = open_saved_model(run_folder("stem_gqa")), load_run(run_folder("stem_gqa"))
    rows, ids, layout = np.full((258, 2, 48), np.nan), np.arange(258), run.rows["stem"].spec.layout
    for some, columns, piece in saved.table_pieces():
        assert np.isnan(rows[some, :, columns]).all()
        rows[some, :, columns] = piece
    expected = logical(np.asarray(run.rows["stem"].rows))[layout.row_numbers(ids)]
    np.testing.assert_allclose(rows, expected, atol=1e-7)
    lagging = saved._read("table_rows", "rows", ...)[layout.row_numbers(ids)]
    assert np.abs(lagging - expected).max() > 1e-3


@pytest.mark.long
@pytest.mark.little_effort
def test_rows_in_host_memory_make_the_same_files(tmp_path):
    for name, resident in (("all", "none"), ("few", "192")):
        flags = [f"--workdir={tmp_path / name}", *OFFLOADABLE]
        train.main([*flags, f"--config.tables.resident_rows={resident}"])
        export.main([f"--workdir={tmp_path / name}", "--format=hf", f"--out={tmp_path / name}_hf"])
    few, every = (
        safetensors.torch.load_file(tmp_path / f"{name}_hf" / "model.safetensors")
        for name in ("few", "all")
    )
    assert all(torch.equal(few[name], every[name]) for name in every)


def test_pieces_and_files_do_not_matter(run_folder, exported, tmp_path, monkeypatch):
    many = exported("stem_gqa")
    index = json.loads((many / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == 3
    tensors = {}
    for name in files:
        tensors |= safetensors.torch.load_file(many / name)
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    monkeypatch.setattr(SavedModel, "_piece_sizes", lambda self, name, spec: (100, 20))
    monkeypatch.setattr(saved_model, "_SLICE_BYTES", 7000)
    export_hf(open_saved_model(run_folder("stem_gqa")), tmp_path / "one")
    single = safetensors.torch.load_file(tmp_path / "one" / "model.safetensors")
    assert single.keys() == tensors.keys()
    assert all(torch.equal(single[name], tensors[name]) for name in tensors)


def test_bfloat16(run_folder, exported, tmp_path):
    export_hf(open_saved_model(run_folder("stem_gqa")), tmp_path / "half", dtype="bfloat16")
    half, whole = _load(tmp_path / "half"), _load(exported("stem_gqa"))
    expected = whole.to(torch.bfloat16).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in half.state_dict().items())


def test_an_earlier_step(train_step, make_batch, tmp_path):
    step = train_step(**{**SIZES, **MODELS["dense"]})
    state = trained_state(step, make_batch)
    save_run(tmp_path, step, state)
    with Checkpointer(tmp_path) as checkpoints:
        info = dataclasses.replace(checkpoints.info(UPDATES), step=UPDATES + 5)
        newer = {name: value + 1 for name, value in state.params.items()}
        checkpoints.save(dataclasses.replace(state, params=newer), info, None)
    newest, older = open_saved_model(tmp_path), open_saved_model(tmp_path, UPDATES)
    assert newest.info.step == UPDATES + 5
    np.testing.assert_array_equal(older.param("norm.scale") + 1, newest.param("norm.scale"))


@pytest.mark.parametrize("kind", ["hf", "official"])
def test_nothing_is_half_written(kind, run_folder, tmp_path, monkeypatch):
    flags = [f"--workdir={run_folder('stem_gqa')}", f"--format={kind}"]
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="there exists; choose another name"):
        export.main([*flags, f"--out={tmp_path / 'there'}"])
    calls = []

    def failing(self, name):
        calls.append(name)
        raise InputError("checkpoint is damaged")

    monkeypatch.setattr(SavedModel, "param", failing)
    with pytest.raises(InputError, match="damaged"):
        export.main([*flags, f"--out={tmp_path / 'new'}"])
    assert len(calls) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_no_space(run_folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"no space for the 0.0 GiB of model.safetensors in"):
        export_hf(open_saved_model(run_folder("stem_gqa")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _other_tokenizer(folder):
    train_sentencepiece(["some words of another text " * 9], folder / "other.model", 280)
    shutil.rmtree(folder / "tokenizer")
    load_tokenizer("sentencepiece", folder / "other.model").save(folder / "tokenizer")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "checkpoints").rename(f / "c"), "has no checkpoints folder"),
        (
            lambda f: next((f / "checkpoints/40/table_rows/d").iterdir()).unlink(),
            "(table_rows/d",
        ),
        (lambda f: next((f / "checkpoints/40/params/d").iterdir()).unlink(), "(params/d"),
        (lambda f: (f / "tokenizer/tokenizer_meta.json").unlink(), "no readable tokenizer_meta"),
        (_other_tokenizer, "was trained with tokenizer"),
    ],
)
def test_a_damaged_run_is_one_line(
    spoil, message, train_step, make_batch, tmp_path, monkeypatch, capsys
):
    step = train_step(**{**SIZES, **MODELS["stem_gqa"]})
    save_run(tmp_path / "run", step, trained_state(step, make_batch))
    spoil(tmp_path / "run")
    flags = [f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", "--format=hf"]
    monkeypatch.setattr(sys, "argv", ["export", *flags])
    with pytest.raises(SystemExit) as left:
        cli.run(export.main)
    error = capsys.readouterr().err
    assert left.value.code == 1
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()
