"""Checkpoints of tables of which the written rows alone are kept."""

import dataclasses

import jax
import numpy as np
import pytest

from stem_jax.checkpoints import store_handler
from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.tables import stores_for
from stem_jax.memory.catalogue import table_specs
from stem_jax.tables import store_snapshot
from stem_jax.tables.first_rows import FirstRows
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.spec import TableSpec
from stem_jax.training.state import abstract_state, init_state, table_key
from tests.logical import logical_table
from tests.offloading import store_arrays


@pytest.fixture(scope="module")
def fresh(train_step):
    step = train_step((1, 1, 1))
    return step, init_state(step.blueprint)


@pytest.fixture
def hashed(monkeypatch):
    """STEM's table is one of hashed keys, as far as the host knows; its pieces are small."""
    monkeypatch.setattr(TableSpec, "made_when_asked", True)
    for module, name, rows in (
        (store_snapshot, "_CHUNK_BYTES", 2),
        (store_snapshot, "_PIECE_BYTES", 4),
        (store_handler, "_READ_BYTES", 4),
    ):
        monkeypatch.setattr(module, name, rows * 2 * 48 * 4)


def info_of(step, touched: int) -> CheckpointInfo:
    return CheckpointInfo(1, 1, 0, {"stem": touched}, "none", {}, step.config)


def some_written(train_step, shape, fraction=0.3, seed=0):
    """A step, and a store with some rows written, of one shard more than of the others."""
    step = train_step(shape)
    store = HostStore.create(table_specs(step.config)["stem"], table_key(step.config), step.mesh)
    rng = np.random.default_rng(seed)
    for shard in dict.fromkeys(block.shard for block in store.blocks):
        blocks = [block for block in store.blocks if block.shard == shard]
        size = len(blocks[0].row_range)
        rows = rng.permutation(size)[: int(size * (fraction if shard else 2 * fraction))]
        for block in blocks:
            values = {
                n: rng.integers(1, 1 << 20, (len(rows), *a.shape[1:])).astype(a.dtype)
                for n, a in block.arrays.items()
            }
            # Of what has no columns there is one for all.
            values["last_step"][:] = rows + 1
            store.write(block, rows, values)
    return step, store


@pytest.mark.parametrize(
    "places", [((2, 2, 2), (1, 1, 1)), ((1, 1, 1), (4, 1, 2)), ((8, 1, 1),) * 2]
)
def test_they_go_anywhere(fresh, train_step, hashed, tmp_path, places):
    step, store = some_written(train_step, places[0])
    count = sum(block.count for block in store.blocks if block.column_range.start == 0)
    whole = store_arrays(store)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(fresh[1], info_of(fresh[0], count), None, {"stem": store})
        checkpoints.wait()
        there = train_step(places[1])
        target, info = abstract_state(there.blueprint), checkpoints.info(1)
        assert info.first_rows == {"stem": FirstRows.of(store.spec, table_key(step.config))}
        offloaded = train_step(places[1], **{"tables.resident_rows": 64}).reads.specs
        stores = stores_for(info, offloaded, there.mesh)
        checkpoints.restore(1, target, stores)
        table = checkpoints.restore(1, target).tables["stem"]
    found = stores["stem"]
    assert count == sum(block.count for block in found.blocks if block.column_range.start == 0)
    for name, array in store_arrays(found).items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)
    for name, array in logical_table(table).items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)


def test_nothing_written_is_a_checkpoint_too(fresh, train_step, hashed, tmp_path):
    step = train_step((1, 1, 1))
    spec = table_specs(step.config)["stem"]
    store = HostStore.create(spec, table_key(step.config), step.mesh)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(fresh[1], info_of(step, 0), None, {"stem": store})
        checkpoints.wait()
        table = checkpoints.restore(1, abstract_state(step.blueprint)).tables["stem"]
    np.testing.assert_array_equal(logical_table(table)["rows"], store_arrays(store)["rows"])


def test_tables_that_were_resident_are_kept_whole(fresh, train_step, hashed, tmp_path):
    step, state = fresh
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state, info_of(step, 0), None)
        checkpoints.wait()
        info = checkpoints.info(1)
        assert info.first_rows == {}
        specs = train_step((1, 1, 1), **{"tables.resident_rows": 64}).reads.specs
        stores = stores_for(info, specs, step.mesh)
        checkpoints.restore(1, abstract_state(step.blueprint), stores)
        [block] = stores["stem"].blocks
        assert block.count == stores["stem"].spec.num_rows
        expected = logical_table(state.tables["stem"])
        np.testing.assert_array_equal(store_arrays(stores["stem"])["rows"], expected["rows"])
        # And so they are saved from then on.
        rows = {n: np.full_like(a[:1], 3) for n, a in block.arrays.items()}
        stores["stem"].write(block, np.array([5]), rows)
        whole = store_arrays(stores["stem"])
        checkpoints.save(state, dataclasses.replace(info_of(step, 1), step=2), None, stores)
        checkpoints.wait()
        assert checkpoints.info(2).first_rows.keys() == {"stem"}
        table = checkpoints.restore(2, abstract_state(step.blueprint)).tables["stem"]
    for name, array in logical_table(table).items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)
    assert (whole["last_step"][5], whole["last_step"].sum()) == (3, 3)


def test_the_key_is_the_checkpoint_s(fresh, train_step, hashed, tmp_path):
    """Rows to come are those of the run that began the table, whatever the seed is now."""
    step = train_step((1, 1, 1))
    first = FirstRows.of(table_specs(step.config)["stem"], jax.random.key(99)).scaled(0.5)
    store = HostStore.empty(table_specs(step.config)["stem"], step.mesh, first)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(fresh[1], info_of(step, 0), None, {"stem": store})
        checkpoints.wait()
        info = checkpoints.info(1)
        specs = train_step((1, 1, 1), **{"tables.resident_rows": 64}).reads.specs
        stores = stores_for(info, specs, step.mesh)
    np.testing.assert_array_equal(
        store_arrays(stores["stem"])["rows"], first.made(store.spec, np.arange(store.spec.num_rows))
    )
