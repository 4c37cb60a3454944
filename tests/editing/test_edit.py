"""stem_jax.edit and what uses its patches: generate, export, runs with tables on the host."""

import hashlib

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from stem_jax import edit, export, generate
from stem_jax.checkpoints.loading import load_run
from stem_jax.editing.patch import edited_run
from stem_jax.editing.patch_file import read_patch
from stem_jax.errors import InputError
from stem_jax.training.state import init_state
from tests.saved_models import SIZES, logits, save_run, trained_state

pytestmark = pytest.mark.little_effort

PROMPT = "abc"


@pytest.fixture(scope="module")
def workdir(train_step, make_batch, tmp_path_factory):
    """A run whose rows lag behind."""
    folder = tmp_path_factory.mktemp("edited")
    step = train_step(**SIZES)
    save_run(folder, step, trained_state(step, make_batch))
    return folder


@pytest.fixture(scope="module")
def patch_path(workdir, tmp_path_factory):
    path = tmp_path_factory.mktemp("patches") / "swap.safetensors"
    edit.main([f"--workdir={workdir}", "--swap=^abc=>^xyz", f"--save={path}"])
    return path


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_an_edit_is_shown_and_saved(workdir, tmp_path, capsys):
    before = digests(workdir)
    path = tmp_path / "one.safetensors"
    argv = [f"--workdir={workdir}", f"--prompt={PROMPT}", "--prompt=xyz", "--max-new-tokens=4"]
    edit.main([*argv, "--swap=^abc=>^xyz", f"--save={path}"])
    out = capsys.readouterr().out
    assert "edit: ^abc=>^xyz; tokens 97,98,99 ('a' 'b' 'c'), layers 0,2, rows" in out
    assert "prompt: abc\nbefore" in out and "next token            before   after" in out
    assert "prompt: xyz" in out and "the edited rows are not read" in out
    assert f"saved as {path}" in out
    edit.main([f"--workdir={workdir}", f"--edits={path}", "--list"])
    assert capsys.readouterr().out.startswith("one.safetensors: ^abc=>^xyz; tokens 97,98,99")
    # A second one on top, in one layer alone.
    second = tmp_path / "two.safetensors"
    edit.main([*argv, "--swap=^a=>^q", f"--edits={path}", "--layers=2", f"--save={second}"])
    assert read_patch(second).layers.tolist() == [2]
    np.testing.assert_array_equal(read_patch(second).before[0, 0], read_patch(path).after[0, 1])
    # Whatever was done, the checkpoint is what it was.
    assert digests(workdir) == before


@pytest.mark.long
def test_generate_reads_patches(workdir, patch_path, capsys):
    argv = [f"--workdir={workdir}", f"--prompt={PROMPT}", "--greedy", "--max-new-tokens=8"]
    texts = []
    for edits in ([], [f"--edits={patch_path}"], []):
        generate.main([*argv, "--no-stream", *edits])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[2]
    # The same rows, some of them on the host.
    generate.main([*argv, "--no-stream", f"--edits={patch_path}", "--resident-rows=64"])
    assert capsys.readouterr().out == texts[1]


def test_an_export_bakes_patches_in(workdir, patch_path, tmp_path):
    run = load_run(workdir)
    laid = edited_run(run, [read_patch(patch_path)])
    export.main(
        [f"--workdir={workdir}", "--format=hf", f"--out={tmp_path / 'hf'}", f"--edits={patch_path}"]
    )
    tensors = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    tables = [tensors[f"model.layers.{layer}.mlp.up_table.weight"] for layer in (0, 2)]
    export.main([f"--workdir={workdir}", "--format=hf", f"--out={tmp_path / 'plain'}"])
    plain = safetensors.numpy.load_file(tmp_path / "plain" / "model.safetensors")
    patch = read_patch(patch_path)
    for column, table in enumerate(tables):
        original = plain[f"model.layers.{(0, 2)[column]}.mlp.up_table.weight"]
        changed = np.flatnonzero((table != original).any(axis=1))
        assert changed.tolist() == patch.ids.tolist()
        np.testing.assert_array_equal(table[changed], patch.after[:, column])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", trust_remote_code=True
    )
    tokens = np.array([[256, *b"a cab, abc"]])
    with torch.no_grad():
        found = model(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(found, logits(laid, tokens), rtol=0, atol=1e-4)
    assert np.abs(found - logits(run, tokens)).max() > 1e-2


def test_a_patch_for_another_run_is_refused_everywhere(workdir, patch_path, tmp_path, train_step):
    step = train_step(**SIZES, **{"train.seed": 3})
    other = tmp_path / "other"
    save_run(other, step, init_state(step.blueprint))
    for main, flags in (
        (generate.main, ["--prompt=abc"]),
        (edit.main, ["--swap=^a=>^b"]),
        (export.main, ["--format=hf", f"--out={tmp_path / 'out'}"]),
    ):
        with pytest.raises(InputError, match=r"patch swap.* was made (for|from)"):
            main([f"--workdir={other}", f"--edits={patch_path}", *flags])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "there is nothing to edit; give --swap, --inject, --measure or --list"),
        (["--swap=^ab=>^ab"], "puts rows in their own place"),
        (["--swap=^ab=>^xy", "--layers=1"], "--layers=1: the layers with tables are 0,2"),
        (["--swap=^ab=>^xy", "--layers=0,0"], "--layers=0,0: the layers with.*each once"),
        (["--swap=^ab=>^xy", "--scale=nan"], "with --scale=nan writes rows that are not finite"),
        (["--inject=^a=inf*^b"], "writes rows that are not finite"),
        (["--swap=^ab=>^xy", "--swap=^bc=>^uv"], "two edits write the rows of token 98"),
        (["--swap=^ab=>^xy", "--edits=/nowhere"], "patch /nowhere cannot be read"),
    ],
)
def test_refusals(workdir, flags, message):
    with pytest.raises(InputError, match=message):
        edit.main([f"--workdir={workdir}", *flags])


def test_dense_runs_have_nothing_to_edit(train_step, tmp_path):
    step = train_step(**SIZES | {"model.stem_layers": "none"})
    save_run(tmp_path, step, init_state(step.blueprint))
    with pytest.raises(InputError, match="the model is dense and has no rows to edit"):
        edit.main([f"--workdir={tmp_path}", "--swap=^a=>^b"])
