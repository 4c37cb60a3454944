"""Patches: they apply, stack, conflict and come off, and leave the table as it was."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.checkpoints.loading import LoadedRun
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.editing.comparison import compare, format_comparison, next_probabilities
from stem_jax.editing.patch import edited_run, make_patch, read_rows
from stem_jax.editing.patch_file import format_patch, read_patch
from stem_jax.editing.swaps import recipes_of
from stem_jax.errors import InputError
from stem_jax.generation.generator import Generator
from stem_jax.memory.catalogue import table_specs
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.offloaded_rows import OffloadedRows
from stem_jax.tables.overlaid_rows import SequenceKeys
from stem_jax.tables.row_source import ResidentRows
from stem_jax.tables.spec import logical, stored
from stem_jax.training.blueprint import Blueprint
from stem_jax.training.state import init_state
from tests.offloading import row_threads

BYTES = load_tokenizer("bytes")
SIZES = {"model.vocab_size": 258, "train.seq_len": 32}


def make_run(tiny_config, device_mesh, offloaded=False) -> LoadedRun:
    config = tiny_config(**SIZES)
    mesh = device_mesh((1, 1, 1))
    state = init_state(Blueprint(config, mesh))
    # Rows as large as trained ones, so that they matter.
    spec = table_specs(config)["stem"]
    whole = jax.random.normal(jax.random.key(1), state.tables["stem"].rows.shape)
    rows = ResidentRows(whole, spec, mesh)
    if offloaded:
        config = tiny_config(**SIZES, **{"tables.resident_rows": 64})
        store = HostStore.allocate(table_specs(config)["stem"], mesh)
        blocks = []
        for block in store.blocks:
            rows = logical(np.asarray(whole))
            block.arrays["rows"][:] = rows[: len(block.arrays["rows"])]
            arrays = {"rows": block.arrays["rows"]}
            blocks.append(dataclasses.replace(block, arrays=arrays))
        store = HostStore(store.spec, tuple(blocks))
        rows = OffloadedRows(store, mesh, "lfu")
    return LoadedRun(config, 7, state.params, {"stem": rows}, BYTES, mesh)


@pytest.fixture(scope="module")
def loaded(tiny_config, device_mesh):
    return make_run(tiny_config, device_mesh)


def swap(run, text, strategy="average", **options):
    return make_patch(run, recipes_of(run.tokenizer, [text], [], strategy), **options)


def probabilities(run, prompt):
    return next_probabilities(
        Generator(run.config, run.params, run.rows, run.tokenizer, run.mesh), run, prompt
    )


def all_rows(run):
    return read_rows(run, np.arange(258))


def test_an_edited_run_is_the_run_of_an_edited_table(loaded):
    before = all_rows(loaded)
    patch = swap(loaded, "^abc=>^xyz", layers=[2])
    laid = edited_run(loaded, [patch])
    expected = before.copy()
    for source, target in zip(b"abc", b"xyz"):
        # The tables are in layers 1 and 2.
        expected[source, 1] = before[target, 1]
    np.testing.assert_array_equal(all_rows(laid), expected)
    spec = loaded.rows["stem"].spec
    table = np.asarray(loaded.rows["stem"].rows).copy()
    table[:, spec.layout.row_numbers(np.arange(258))] = stored(expected)
    really = loaded.with_rows("stem", ResidentRows(jnp.asarray(table), spec, loaded.mesh))
    for prompt in ("the cab", "xyz", "zzz abc"):
        np.testing.assert_array_equal(probabilities(laid, prompt), probabilities(really, prompt))
    assert np.abs(probabilities(laid, "the cab") - probabilities(loaded, "the cab")).max() > 1e-4
    # Bit for bit what it was: the table, and texts without the edited tokens.
    np.testing.assert_array_equal(all_rows(loaded), before)
    np.testing.assert_array_equal(probabilities(laid, "xyz"), probabilities(loaded, "xyz"))


def test_offloaded_rows_are_edited_alike(loaded, tiny_config, device_mesh):
    run = make_run(tiny_config, device_mesh, offloaded=True)
    np.testing.assert_array_equal(all_rows(run), all_rows(loaded))
    patch = swap(run, "^abc=>^xy", "copy")
    assert patch.run == run.fingerprint
    same = swap(loaded, "^abc=>^xy", "copy")
    np.testing.assert_array_equal(patch.after, same.after)
    prompt, edited = "a cab, abc", edited_run(run, [patch])
    np.testing.assert_array_equal(
        probabilities(edited, prompt), probabilities(edited_run(loaded, [same]), prompt)
    )
    assert row_threads()
    # Whatever lies over the rows ends their threads.
    by_sequence = SequenceKeys(edited.rows["stem"], 258, [{}])
    edited.with_rows("stem", by_sequence).close()
    assert row_threads() == []
    loaded.close()


def test_files_come_back_as_they_were(loaded, tmp_path):
    patch = swap(loaded, "^abc=>^x", "pad_left", scale=0.5, description="abc to x")
    patch.save(tmp_path / "folder" / "abc.safetensors")
    found = read_patch(tmp_path / "folder" / "abc.safetensors")
    for name in ("ids", "layers", "before", "after"):
        np.testing.assert_array_equal(getattr(found, name), getattr(patch, name))
    assert (found.run, found.tokenizer) == (loaded.fingerprint, BYTES.fingerprint)
    assert found.name == "abc.safetensors" and found.description == "abc to x"
    assert (found.after[:2] == 0).all()
    np.testing.assert_array_equal(found.after[2], np.float32(0.5) * all_rows(loaded)[ord("x")])
    line = format_patch(found)
    assert line.startswith("abc.safetensors: abc to x; tokens 97,98,99, layers 1,2, rows moved by ")
    with pytest.raises(InputError, match="exists; choose another name"):
        patch.save(tmp_path / "folder" / "abc.safetensors")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["abc.safetensors"]


def test_patches_stack_and_come_off(loaded):
    before = all_rows(loaded)
    first = swap(loaded, "^a=>^x")
    second = swap(loaded, "^b=>^a", base=[first])
    third = swap(loaded, "^a=>^y", base=[first, second])
    laid = all_rows(edited_run(loaded, [first, second, third]))
    # b took a's row as the first patch had left it.
    np.testing.assert_array_equal(laid[ord("b")], before[ord("x")])
    np.testing.assert_array_equal(laid[ord("a")], before[ord("y")])
    np.testing.assert_array_equal(all_rows(edited_run(loaded, [first, second]))[97], before[120])
    np.testing.assert_array_equal(all_rows(edited_run(loaded, [])), before)


def test_conflicts_are_named(loaded):
    first = swap(loaded, "^a=>^x", name="one")
    second = swap(loaded, "^a=>^y", name="two")
    with pytest.raises(InputError, match="patches one and two conflict: both write the row of tok"):
        edited_run(loaded, [first, second])
    # Other layers of the same token do not conflict.
    halves = [swap(loaded, "^a=>^x", layers=[1]), swap(loaded, "^a=>^y", layers=[2])]
    laid = all_rows(edited_run(loaded, halves))
    np.testing.assert_array_equal(laid[97, 0], all_rows(loaded)[ord("x"), 0])
    np.testing.assert_array_equal(laid[97, 1], all_rows(loaded)[ord("y"), 1])
    on_top = swap(loaded, "^a=>^y", base=[first], name="on_top")
    with pytest.raises(InputError, match="patch on_top was made from another value of the row"):
        edited_run(loaded, [on_top])


def test_patches_for_others_are_refused(loaded, tmp_path):
    patch = swap(loaded, "^a=>^x")
    later = dataclasses.replace(loaded, step=8)
    with pytest.raises(InputError, match=f"edit was made for checkpoint {patch.run[:12]}, this is"):
        edited_run(later, [patch])
    other = dataclasses.replace(patch, tokenizer="f" * 64)
    with pytest.raises(InputError, match="edit was made with tokenizer ffffffffffff, the run has"):
        edited_run(loaded, [other])
    narrow = dataclasses.replace(patch, before=patch.before[..., :5], after=patch.after[..., :5])
    with pytest.raises(InputError, match=r"edit writes rows of width 5 in layers .* width 48"):
        edited_run(loaded, [narrow])
    moved = dataclasses.replace(patch, layers=np.array([0, 2], np.int32))
    with pytest.raises(InputError, match=r"in layers \[0, 2\]; the model has tables of width 48"):
        edited_run(loaded, [moved])
    dataclasses.replace(patch, before=patch.before[:, :1]).save(tmp_path / "short")
    with pytest.raises(InputError, match=r"short: before is \(1, 1, 48\), its 1 tokens and 2 lay"):
        read_patch(tmp_path / "short")
    (tmp_path / "text").write_text("not a patch")
    with pytest.raises(InputError, match="text cannot be read"):
        read_patch(tmp_path / "text")
    with pytest.raises(InputError, match="none cannot be read"):
        read_patch(tmp_path / "none")
    with pytest.raises(InputError, match="--layers=0,1: the layers with tables are 1,2"):
        swap(loaded, "^a=>^x", layers=[0, 1])


def test_injected_rows(loaded):
    rows = all_rows(loaded)
    recipes = recipes_of(BYTES, [], ["^a=0.5*^b+2*^c"], "average")
    laid = all_rows(edited_run(loaded, [make_patch(loaded, recipes)]))
    np.testing.assert_allclose(laid[97], 0.5 * rows[98] + 2 * rows[99], rtol=0, atol=1e-6)
    given = np.full((1, 48), 3.0, np.float32)
    recipe = dataclasses.replace(recipes[0], parts=(), given=given[0])
    laid = all_rows(edited_run(loaded, [make_patch(loaded, [recipe])]))
    assert (laid[97] == 3).all()
    with pytest.raises(
        InputError, match=r"a row to inject is \(1, 48\); the model's are \(2, 48\)"
    ):
        make_patch(loaded, [dataclasses.replace(recipe, given=given)])


def test_a_comparison_shows_what_moved(loaded):
    laid = edited_run(loaded, [swap(loaded, "^abc=>^xyz")])
    cab, zzz = compare(loaded, laid, ["the cab", "zzz"], 5, 3)
    assert zzz.before == zzz.after
    assert format_comparison(zzz).endswith("the edited rows are not read")
    assert len(cab.moved) == 3
    sizes = [abs(moved.after - moved.before) for moved in cab.moved]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 0
    assert "next token" in format_comparison(cab)


def test_one_program_reads_a_run_before_and_after_an_edit(loaded, caplog):
    patch = swap(loaded, "ab=>xy")
    before, after = edited_run(loaded, [], [patch]), edited_run(loaded, [patch])
    np.testing.assert_array_equal(all_rows(before), all_rows(loaded))
    with jax.log_compiles():
        compare(before, after, ["abcab", "cab"], 4, 3)
    compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)
    counts = {name: compiled.count(name) for name in ("_prefill", "_decode", "run_prompt")}
    # The prompts have two lengths.
    assert counts == {"_prefill": 1, "_decode": 1, "run_prompt": 2}


def test_rows_are_read_by_few_programs(loaded, caplog):
    with jax.log_compiles():
        found = [read_rows(loaded, np.arange(size)) for size in (33, 40, 64)]
    np.testing.assert_array_equal(found[0], found[2][:33])
    compiled = re.findall(r"Finished XLA compilation of jit\(([^)]+)\)", caplog.text)
    assert compiled.count("_rows_of") <= 1 and len(compiled) <= 4
