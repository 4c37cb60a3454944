"""Runs with several memories, read: the same with few of their rows on the device; refusals."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from stem_jax import analyze
from stem_jax.checkpoints.checkpointer import Checkpointer, CheckpointInfo
from stem_jax.checkpoints.files import LIST, damage
from stem_jax.checkpoints.loading import checkpoint_fingerprint, load_run
from stem_jax.editing.patch import make_patch
from stem_jax.errors import InputError
from stem_jax.memory.catalogue import table_specs
from stem_jax.run_checks import check_hosts
from stem_jax.tables.row_slots import too_few_slots
from stem_jax.training.blueprint import Blueprint
from stem_jax.training.resume import check_resumable
from stem_jax.training.state import init_state, state_shardings
from tests.memory.test_memory_steps import MEMORIES
from tests.saved_models import BYTES, greedy

SIZES = MEMORIES | {
    "model.vocab_size": 258,
    "model.num_layers": 2,
    "value.layers": (1,),
    "per_layer.layers": (0,),
    "ngram.layers": (1,),
    "ngram.keys_per_head": 300,
    "ngram.eos_id": BYTES.eos_id,
    "train.seq_len": 32,
}
PROMPTS = [list(b"abc"), list(b"a longer prompt")]


@pytest.fixture(scope="module")
def config(tiny_config):
    return tiny_config(**SIZES)


def _save(folder, config, state) -> None:
    BYTES.save(folder / "tokenizer")
    touched = dict.fromkeys(state.tables, 0)
    info = CheckpointInfo(0, 0, 0, touched, BYTES.fingerprint, {"seed": 0}, config)
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(state, info, None)


@pytest.fixture(scope="module")
def folder(config, device_mesh, tmp_path_factory):
    """A checkpoint of step 0 whose rows are large enough to matter."""
    folder = tmp_path_factory.mktemp("run")
    blueprint = Blueprint(config, device_mesh((1, 1, 1)))
    state, places = init_state(blueprint), state_shardings(blueprint).tables
    tables = {
        name: dataclasses.replace(
            table, rows=jax.device_put(20 * np.asarray(table.rows), places[name].rows)
        )
        for name, table in state.tables.items()
    }
    _save(folder, config, dataclasses.replace(state, tables=tables))
    return folder


@pytest.mark.long
@pytest.mark.little_effort
def test_few_rows_of_each_memory_on_the_device_give_the_same_tokens(folder):
    resident, few = load_run(folder), load_run(folder, resident_rows=96)
    assert few.rows.keys() == {"stem", "value", "per_layer", "ngram"}
    for name, rows in few.rows.items():
        assert rows.spec.offloaded and rows.spec.num_slots == 96, name
    assert greedy(few, PROMPTS, 12) == greedy(resident, PROMPTS, 12)
    few.close()
    # Of those that have no more, all; n-grams have more.
    some = load_run(folder, resident_rows=640)
    assert [n for n, rows in some.rows.items() if rows.spec.offloaded] == ["ngram"]
    some.close()
    tight = load_run(folder, resident_rows=32)
    with pytest.raises(InputError, match=r"distinct n-grams .* ngram.resident_rows=32 keeps"):
        greedy(tight, PROMPTS, 12)
    tight.close()


def test_a_checkpoint_without_a_list_needs_the_items_of_every_memory(folder):
    checkpoint = folder / "checkpoints" / "0"
    listed = (checkpoint / LIST).read_text()
    (checkpoint / LIST).unlink()
    assert damage(checkpoint) is None
    for item in ("ngram_moments", "value_rows"):
        (checkpoint / item).rename(checkpoint / "elsewhere")
        assert damage(checkpoint) == f"without {LIST} and {item}"
        (checkpoint / "elsewhere").rename(checkpoint / item)
    config = json.loads((checkpoint / "config" / "metadata").read_text())
    assert config["value"]["layers"] == [1]
    (checkpoint / LIST).write_text(listed)


def test_a_fingerprint_tells_memories_apart(config, tiny_config):
    def of(**overrides):
        changed = tiny_config(**SIZES | overrides)
        return checkpoint_fingerprint(changed, 0, BYTES, np.ones(4))

    own = checkpoint_fingerprint(config, 0, BYTES, np.ones(4))
    others = [of(**{"value.layers": (0,)}), of(**{"ngram.seed": 1}), of(**{"value.layers": "none"})]
    assert len({own, *others}) == 4
    # Where there is no such memory, its other keys say nothing.
    without = {"ngram.layers": "none", "value.layers": "none", "per_layer.layers": "none"}
    assert of(**without) == of(**without, **{"ngram.heads": 4})
    assert of(**{"ngram.resident_rows": 64}) == own


def test_another_set_of_memories_does_not_go_on(config, tiny_config):
    changes = {
        "value.layers": ("none", r"value\.layers: \(1,\) -> \(\)"),
        "per_layer.layers": ((0, 1), r"per_layer\.layers: \(0,\) -> \(0, 1\)"),
        "ngram.row_format": ("bfloat16", r"ngram\.row_format: None -> 'bfloat16'"),
        "ngram.moments": ("rowwise", r"ngram\.moments: None -> 'rowwise'"),
    }
    for key, (value, message) in changes.items():
        with pytest.raises(InputError, match=message):
            check_resumable(config, tiny_config(**SIZES | {key: value}), 3)
    check_resumable(config, tiny_config(**SIZES | {"ngram.resident_rows": 64}), 3)


def test_refusals_name_the_keys_of_the_memory(config, tiny_config):
    few = {f"{n}.resident_rows": 32 for n in ("tables", "value", "per_layer", "ngram")}
    specs = table_specs(tiny_config(**SIZES | few))
    keys = {name: spec.resident_key for name, spec in specs.items()}
    assert keys == {
        "stem": "tables.resident_rows",
        "value": "value.resident_rows",
        "per_layer": "per_layer.resident_rows",
        "ngram": "ngram.resident_rows",
    }
    assert too_few_slots(specs["ngram"], 99).startswith("ngram.resident_rows=32 is less")
    [rows, *_] = specs["ngram"].placed()
    assert "ngram.resident_rows a multiple" in rows.remedy and "ngram.width" in rows.remedy
    message = r"with value\.resident_rows and ngram\.resident_rows .* ngram\.keys_per_head"
    with pytest.raises(InputError, match=message):
        check_hosts([("a", 9, 8)], [specs["value"], specs["ngram"]])


def test_rows_of_other_memories_are_not_edited(config, tiny_config):
    @dataclasses.dataclass
    class Run:
        config: object
        rows: dict

    dense = tiny_config(**SIZES | {"model.stem_layers": "none"})
    with pytest.raises(InputError, match="has rows of value, ngram alone; edits are made of STEM"):
        make_patch(Run(dense, {"value": None, "ngram": None}), [])


@pytest.mark.parametrize("section", ["value", "per_layer", "ngram"])
def test_dense_adamw_rounds_no_rows_of_a_memory(tiny_config, section):
    keys = {f"{section}.row_format": "bfloat16", "tables.optimizer": "dense_adamw"}
    with pytest.raises(InputError, match=rf"{section}\.row_format=bfloat16 rounds the rows"):
        tiny_config(**SIZES | keys)


@pytest.mark.long
@pytest.mark.little_effort
def test_a_run_without_stem_is_analysed(tiny_config, device_mesh, tmp_path, capsys):
    """What its feed-forward layers read needs rows that an analysis of dense layers has not."""
    only = {"model.stem_layers": "none", "value.layers": "none", "per_layer.layers": "none"}
    config = tiny_config(**SIZES | only)
    _save(tmp_path / "run", config, init_state(Blueprint(config, device_mesh((1, 1, 1)))))
    text = tmp_path / "text.txt"
    text.write_text("A text of some words, which is read. " * 40)
    analyze.main([f"--workdir={tmp_path / 'run'}", f"--text={text}"])
    assert "no rows of STEM's, but of ngram" in capsys.readouterr().out
