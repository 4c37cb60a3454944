"""Tables that stay as they are keep their rows and nothing else."""

import jax
import numpy as np
import pytest

from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.files import LIST, damage
from stem_jax.memory.catalogue import table_specs
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.spec import Field, TableSpec
from stem_jax.training.blueprint import Blueprint
from stem_jax.training.schedule import make_schedule
from stem_jax.training.start_report import describe_run
from stem_jax.training.state import abstract_state, init_state, table_key

FROZEN = {"model.num_layers": 2, "model.stem_layers": (1,), "optimizer.train": "backbone"}
# What tables had before, whatever trained.
BEFORE = (
    Field("rows", "float32"),
    Field("mu", "float32"),
    Field("nu", "float32"),
    Field("last_step", "int32", "R"),
)


def _steps(step, state, make_batch, first: int, last: int):
    for number in range(first, last):
        batch = make_batch(step, seed=number)
        state, _ = step.update(state, batch, make_schedule(step.config, 8))
    return state


def _save(folder, step, state, stores=None) -> None:
    info = CheckpointInfo(
        int(state.step), int(state.updates), 0, {"stem": 0}, "none", {}, step.config
    )
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(state, info, None, stores)
        checkpoints.wait()


def _restored(folder, number, step, stores=None):
    with Checkpointer(folder, read_only=True) as checkpoints:
        return checkpoints.restore(number, abstract_state(step.blueprint), stores)


def _assert_same(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_frozen_tables_have_rows_alone(train_step, make_batch, tmp_path):
    """On the devices, in checkpoints, resumed bit for bit, and in the list of what is whole."""
    step = train_step(**FROZEN)
    state = _steps(step, init_state(step.blueprint), make_batch, 0, 2)
    assert vars(state.tables["stem"]).keys() == {"rows"}
    _save(tmp_path, step, state)
    folder = tmp_path / "checkpoints" / "2"
    assert (folder / "table_rows").is_dir() and not (folder / "table_slots").exists()
    again = _restored(tmp_path, 2, step)
    _assert_same(again, state)
    state, again = (_steps(step, s, make_batch, 2, 4) for s in (state, again))
    _assert_same(again, state)
    (folder / LIST).unlink()
    assert damage(folder) is None


@pytest.mark.parametrize("resident", [None, 64])
def test_moments_in_earlier_checkpoints_are_passed_over(
    train_step, make_batch, tmp_path, monkeypatch, resident
):
    """Into arrays, and into the store of a table in host memory."""
    resident_step = train_step(**FROZEN)
    with monkeypatch.context() as earlier:
        earlier.setattr(TableSpec, "fields", BEFORE)
        state = init_state(resident_step.blueprint)
        assert len(vars(state.tables["stem"])) == 4
        rows = np.asarray(state.tables["stem"].rows).swapaxes(0, 1)
        _save(tmp_path, resident_step, state)
    assert (tmp_path / "checkpoints" / "0" / "table_slots").is_dir()
    step = train_step(**FROZEN, **({"tables.resident_rows": resident} if resident else {}))
    spec, stores = step.reads.specs["stem"], {}
    if resident:
        stores = {"stem": HostStore.allocate(spec, step.mesh)}
        assert stores["stem"].fields == ("rows",)
    state = _restored(tmp_path, 0, step, stores)
    if resident:
        np.testing.assert_array_equal(stores["stem"].blocks[0].arrays["rows"], rows)
        _save(tmp_path / "again", step, state, stores)
        return
    np.testing.assert_array_equal(np.asarray(state.tables["stem"].rows).swapaxes(0, 1), rows)
    state = _steps(step, state, make_batch, 0, 2)
    expected = _steps(step, init_state(step.blueprint), make_batch, 0, 2)
    _assert_same(state, expected)


def test_frozen_tables_are_counted_without_moments(tiny_config, device_mesh):
    mesh, sizes = device_mesh((2, 2, 2)), {}
    for train in ("all", "backbone"):
        keys = {"model.ffn_dim": 512, "model.vocab_size": 1024, "optimizer.train": train}
        config = tiny_config(**keys)
        spec = table_specs(config)["stem"]
        [line] = [
            line
            for line in describe_run(Blueprint(config, mesh)).splitlines()
            if line.startswith("memory ")
        ]
        reported = float(line.partition("tables with moments ")[2].split()[0])
        placed = sum(array.device_bytes(mesh) for array in spec.placed())
        assert reported == pytest.approx(placed / 2**20, abs=0.06)
        store = HostStore.create(spec, table_key(config), mesh)
        assert HostStore.needed_bytes(spec, mesh) == store.num_bytes
        sizes[train] = reported, spec.row_bytes()
    assert sizes["backbone"][1] == 2 * 512 * 4
    assert sizes["all"][0] == pytest.approx(3 * sizes["backbone"][0], abs=0.1)
