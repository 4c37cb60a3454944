"""Runs with several memories, read: the same with few of their rows on the device; refusals."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from stem_jax import analyze
from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.files import LIST, damage
from stem_jax.checkpoints.loading import checkpoint_fingerprints, load_run
from stem_jax.errors import InputError
from stem_jax.memory.catalogue import memories, table_specs
from stem_jax.run_checks import check_device_tables, check_hosts, device_table_bytes
from stem_jax.tables.row_slots import too_few_slots
from stem_jax.training.blueprint import Blueprint
from stem_jax.training.resume import check_continuable, check_resumable
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


def save(folder, config, state) -> None:
    """A checkpoint of step 0."""
    BYTES.save(folder / "tokenizer")
    touched = dict.fromkeys(state.tables, 0)
    info = CheckpointInfo(0, 0, 0, touched, BYTES.fingerprint, {"seed": 0}, config)
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(state, info, None)


def save_large_rows(folder, config, mesh):
    """A checkpoint of step 0 whose rows are large enough to matter."""
    blueprint = Blueprint(config, mesh)
    state, places = init_state(blueprint), state_shardings(blueprint).tables
    tables = {
        name: dataclasses.replace(
            table, rows=jax.device_put(20 * np.asarray(table.rows), places[name].rows)
        )
        for name, table in state.tables.items()
    }
    save(folder, config, dataclasses.replace(state, tables=tables))
    return folder


@pytest.fixture(scope="module")
def folder(config, device_mesh, tmp_path_factory):
    return save_large_rows(tmp_path_factory.mktemp("run"), config, device_mesh((1, 1, 1)))


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
        return checkpoint_fingerprints(changed, 0, BYTES, np.ones(4))

    own = checkpoint_fingerprints(config, 0, BYTES, np.ones(4))
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
        "ngram.eos_id": (7, r"ngram\.eos_id: 257 -> 7"),
        "value.beta1": (0.5, r"value\.beta1: None -> 0\.5"),
    }
    for key, (value, message) in changes.items():
        with pytest.raises(InputError, match=message):
            check_resumable(config, tiny_config(**SIZES | {key: value}), 3)
    check_resumable(config, tiny_config(**SIZES | {"ngram.resident_rows": 64}), 3)


def test_a_value_may_be_said_or_taken(config, tiny_config, tmp_path):
    """None is what it stands for; eos may be left to the tokenizer again."""
    said = {
        "ngram.row_format": "float32",
        "value.moments": "adamw",
        "per_layer.weight_decay": config.optimizer.weight_decay,
        "tables.weight_decay": config.optimizer.weight_decay,
        "ngram.beta2": config.optimizer.beta2,
        "value.clip_norm": config.tables.clip_norm,
        "ngram.init_std": 0.02,
        "ngram.eos_id": None,
    }
    other = tiny_config(**SIZES | said | {"train.steps": 30})
    check_resumable(config, other, 0)
    check_continuable(tmp_path, 3, config, other)
    # Of two keys that change, each is looked at by what it becomes.
    changed = tiny_config(
        **SIZES | {"tables.row_format": "bfloat16", "ngram.row_format": "float32"}
    )
    with pytest.raises(InputError, match=r"configuration \(tables\.row_format: [^;]*\); to"):
        check_resumable(config, changed, 3)


def test_what_is_said_of_a_memory_that_is_not_there(config, tiny_config):
    without = {"ngram.layers": "none"}
    saved = tiny_config(**SIZES | without)
    check_resumable(saved, tiny_config(**SIZES | without | {"ngram.heads": 4}), 3)
    # Only what differs by what was said: eos comes from the tokenizer.
    now = tiny_config(**SIZES | without | {"ngram.eos_id": None})
    with pytest.raises(
        InputError, match=r"\(ngram\.layers: \(1,\) -> \(\)\); to continue"
    ) as refused:
        check_resumable(config, now, 3)
    assert "add --config.ngram.layers=1, or start" in str(refused.value)


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
    placed = {name: spec.placed()[0] for name, spec in specs.items()}
    assert [rows.name for rows in placed.values()] == [
        "table_rows",
        "value_rows",
        "per_layer_rows",
        "ngram_rows",
    ]
    assert "ngram.resident_rows a multiple" in placed["ngram"].remedy
    for name, width in (
        ("stem", "model.ffn_dim"),
        ("value", "model.num_kv_heads * model.head_dim"),
        ("per_layer", "per_layer.width"),
        ("ngram", "ngram.width / ((ngram.max_order - 1) * ngram.heads)"),
    ):
        assert f"and {width} of mesh.tensor" in placed[name].remedy
    message = r"with value\.resident_rows and ngram\.resident_rows .* ngram\.keys_per_head"
    with pytest.raises(InputError, match=message):
        check_hosts([("a", 9, 8)], [specs["value"], specs["ngram"]])


def test_tables_on_cpus_are_in_host_memory(config, tiny_config, device_mesh):
    """More than there is is refused before anything is allocated, by the keys of its size."""
    specs, mesh = table_specs(config), device_mesh((2, 2, 2))
    logical = sum(spec.row_bytes() * spec.num_rows for spec in specs.values())
    # Of last_step each column has a copy.
    assert device_table_bytes(mesh, specs) == logical + 4 * sum(s.num_rows for s in specs.values())
    check_device_tables([("a", logical, logical)], specs)
    message = (
        r"CPUs here, and the tables of stem, value, per_layer, ngram .* 3\.00 GiB on host a, 1\.00 "
        r"GiB are .*, or lower model\.ffn_dim, .*ngram\.keys_per_head"
    )
    with pytest.raises(InputError, match=message):
        check_device_tables([("a", 3 << 30, 1 << 30), ("b", 1, 2)], specs)
    # 10^8 keys of a memory beside others, 24 TB.
    large = tiny_config(**SIZES | {"ngram.keys_per_head": 25_000_000})
    assert device_table_bytes(mesh, table_specs(large)) > 1e8 * 12 * 8


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"ngram.heads": 0}, r"ngram\.heads=0 must be at least 1"),
        ({"ngram.max_order": 1}, r"ngram\.max_order=1 must be at least 2"),
        ({"ngram.width": 0}, r"ngram\.width=0 must be at least 1"),
        ({"ngram.keys_per_head": 0}, r"ngram\.keys_per_head=0 must be at least 1"),
        ({"ngram.eos_id": -1}, r"ngram\.eos_id=-1 must be 0 or more"),
        ({"value.beta1": 1.0}, r"value\.beta1=1\.0 must be in \[0, 1\)"),
        ({"ngram.reader": "all"}, r"ngram\.reader='all' is unknown"),
        ({"ngram.keys_per_head": 5}, None),
        ({"ngram.width": 7}, None),
        ({"ngram.reader": "value"}, None),
        ({"value.beta1": 0.999}, None),
        ({"value.row_format": "bfloat16", "tables.optimizer": "dense_adamw"}, None),
        ({"ngram.resident_rows": 9, "tables.optimizer": "dense_adamw"}, None),
        ({"tables.resident_rows": 9, "tables.optimizer": "dense_adamw"}, None),
        ({"tables.row_format": "bfloat16", "tables.optimizer": "dense_adamw"}, None),
    ],
)
def test_settings_of_a_memory_that_is_not_there_have_their_own_range_alone(
    tiny_config, said, message
):
    keys = {"model.stem_layers": "none"} | said
    if message is None:
        assert not memories(tiny_config(**keys))
    else:
        with pytest.raises(InputError, match=message):
            tiny_config(**keys)


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
    save(tmp_path / "run", config, init_state(Blueprint(config, device_mesh((1, 1, 1)))))
    text = tmp_path / "text.txt"
    text.write_text("A text of some words, which is read. " * 40)
    analyze.main([f"--workdir={tmp_path / 'run'}", f"--text={text}"])
    out = capsys.readouterr().out
    assert "no rows of STEM's, but of ngram" in out and "vectors are those" not in out
    page = (tmp_path / "run" / "analysis" / "index.html").read_text()
    assert "ngram layers" in page and "a dense model" not in page
