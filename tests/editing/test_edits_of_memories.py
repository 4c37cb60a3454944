"""Edits of other memories whose keys are tokens: value embeddings and per-layer embeddings."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy

from stem_jax import edit, export, generate
from stem_jax.checkpoints.loading import load_run
from stem_jax.editing.measurement import lay_edits
from stem_jax.editing.patch import edited_run, make_patch, read_rows
from stem_jax.editing.patch_file import read_patch
from stem_jax.editing.swaps import recipes_of, swap_recipes
from stem_jax.errors import InputError
from stem_jax.evaluation.scoring import Scorer
from stem_jax.memory.catalogue import table_specs
from tests.memory.test_memory_runs import SIZES, save_large_rows
from tests.saved_models import logits

SWAP = "^abc=>^xyz"
TOKENS = np.array([[256, *b"a cab, abc xyz"]])


@pytest.fixture(scope="module")
def folder(tiny_config, device_mesh, tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    return save_large_rows(path, tiny_config(**SIZES), device_mesh((1, 1, 1)))


@pytest.fixture(scope="module")
def run(folder):
    return load_run(folder)


def _swap(run, memory, **options):
    recipes = recipes_of(run.tokenizer, [SWAP], [], "average")
    return make_patch(run, recipes, memory=memory, **options)


def _written(run, memory, patch):
    """The run with the rows of a patch in the table itself."""
    source = run.rows[memory]
    places = table_specs(run.config)[memory].layout.row_numbers(patch.ids)
    rows_SxRxF = np.array(source.rows)
    rows_SxRxF[:, places] = patch.after.swapaxes(0, 1)
    return run.with_rows(memory, dataclasses.replace(source, rows=jax.numpy.asarray(rows_SxRxF)))


@pytest.mark.parametrize("memory", ["value", "per_layer"])
def test_an_edited_run_is_that_of_an_edited_table(run, memory):
    patch = _swap(run, memory)
    own = read_rows(run, np.array([*b"xyz"]), memory)
    np.testing.assert_array_equal(patch.after, own)
    found = logits(edited_run(run, [patch]), TOKENS)
    np.testing.assert_array_equal(found, logits(_written(run, memory, patch), TOKENS))
    assert np.abs(found - logits(run, TOKENS)).max() > 1e-2


def test_patches_of_several_memories_stack(run, folder):
    first, second = _swap(run, "value"), _swap(run, "stem")
    both = edited_run(run, [first, second])
    expected = logits(_written(_written(run, "value", first), "stem", second), TOKENS)
    np.testing.assert_array_equal(logits(both, TOKENS), expected)
    # On top of another of its own memory; one of another memory conflicts with neither.
    third = _swap(run, "value", base=[first, second], scale=2.0)
    np.testing.assert_array_equal(third.before, first.after)
    edited_run(run, [first, second, third])
    with pytest.raises(InputError, match="patches edit and edit conflict"):
        edited_run(run, [first, second, _swap(run, "value")])
    # The same with few rows of each on the device.
    few = load_run(folder, resident_rows=96)
    np.testing.assert_allclose(
        logits(edited_run(few, [first, second]), TOKENS), expected, atol=1e-6
    )
    few.close()


def test_edits_are_measured_beside_the_table(run):
    sequences = [[256, *b"cab abc"], [256, *b"xyz abc"]]
    for memory in ("value", "per_layer"):
        laid = lay_edits(run, [swap_recipes(run.tokenizer, SWAP, "average")], None, memory)
        keys = [[laid.keys[0].get(token, token) for token in ids] for ids in sequences]
        found = Scorer(laid.run, keyed=memory).score(sequences, keys=keys)
        expected = Scorer(edited_run(run, [_swap(run, memory)])).score(sequences)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one.log_likelihoods, other.log_likelihoods, atol=1e-5)
        assert np.abs(found[0].log_likelihoods - _plain(run, sequences)).max() > 1e-3


def _plain(run, sequences):
    return Scorer(run).score(sequences)[0].log_likelihoods


def test_a_patch_says_whose_rows_it_writes(folder, tmp_path, capsys):
    path = tmp_path / "value.safetensors"
    argv = [f"--workdir={folder}", "--memory=value", f"--swap={SWAP}", "--prompt=abc"]
    edit.main([*argv, "--max-new-tokens=2", f"--save={path}"])
    out = capsys.readouterr().out
    assert "tokens 97,98,99 ('a' 'b' 'c'), layers 1, value rows moved by" in out
    assert "next token            before   after" in out
    found = read_patch(path)
    assert (found.memory, found.after.shape) == ("value", (3, 1, 16))
    # A version that knows of STEM's rows alone takes it for none.
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata()["format"] == "stem_jax patch 2"
    edit.main([f"--workdir={folder}", f"--edits={path}", "--list"])
    assert "value rows moved by" in capsys.readouterr().out
    generate.main([f"--workdir={folder}", "--prompt=abc", "--max-new-tokens=2", f"--edits={path}"])
    assert capsys.readouterr().out.startswith("abc")
    with pytest.raises(InputError, match=r"ngram.layers=.* has no counterpart in"):
        out = tmp_path / "out"
        export.main([f"--workdir={folder}", "--format=hf", f"--out={out}", f"--edits={path}"])


def test_memories_without_rows_of_tokens_are_refused(folder, run, tiny_config, device_mesh):
    argv = [f"--workdir={folder}", f"--swap={SWAP}"]
    with pytest.raises(InputError, match=r"hashes of several tokens; .* --memory=stem or --memory"):
        edit.main([*argv, "--memory=ngram"])
    with pytest.raises(
        InputError, match=r"the model has no values rows; .* stem, value, per_layer"
    ):
        edit.main([*argv, "--memory=values"])
    with pytest.raises(InputError, match=r"--layers=0: the layers with tables are 1; name"):
        edit.main([*argv, "--memory=value", "--layers=0"])
    only = tiny_config(**SIZES | {"model.stem_layers": "none", "value.layers": "none"})
    other = dataclasses.replace(run, config=only)
    with pytest.raises(InputError, match=r"no stem rows; .* those of per_layer: give --memory=per"):
        make_patch(other, [])
    with pytest.raises(InputError, match=r"no value rows"):
        edited_run(other, [_swap(run, "value")])
    hashes = tiny_config(**SIZES | {f"{n}.layers": "none" for n in ("value", "per_layer")})
    hashes = dataclasses.replace(hashes, model=dataclasses.replace(hashes.model, stem_layers=()))
    with pytest.raises(InputError, match=r"no stem rows; edits .* of which it has none"):
        make_patch(dataclasses.replace(run, config=hashes), [])
