"""A second memory beside STEM's: two keys for a token, three vectors, a reader of its own.

Nothing of the package knows of it but the catalogue, which the tests fill.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.checkpoints import checkpointer as checkpoint
from stem_jax.checkpoints.checkpointer import Checkpointer, CheckpointInfo
from stem_jax.memory import catalogue
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.lookup import close_rows, lookup, open_rows
from stem_jax.tables.prefetch import Prefetch
from stem_jax.tables.spec import TableState
from stem_jax.training import blueprint
from stem_jax.training.look_ahead import LookAhead
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import abstract_state, init_state, table_key
from stem_jax.training.step import TrainStep
from tests.offloading import SIZES, zipf_data

STEPS = 2
KEYS = 3000


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Keys of a token with the one before it, and with the one before that."""

    name: str = "pairs"
    num_keys: int = KEYS
    vectors: int = 3
    width: int = 16
    reach: int = 2

    def keys(self, tokens_BxL, segment_ids_BxL, before_BxR=None):
        before = [_shifted(tokens_BxL, segment_ids_BxL, by) for by in (1, 2)]
        xp = jnp if isinstance(tokens_BxL, jax.Array) else np
        keys = [(tokens_BxL + factor * b) % KEYS for factor, b in zip((7, 31), before, strict=True)]
        return xp.stack(keys, -1)

    def reads(self, layer: int):
        return (slice(0, 2), 1) if layer == 0 else None


def _shifted(tokens, segment_ids, by: int):
    """The token so many places before, of the same document; 0 where there is none."""
    xp = jnp if isinstance(tokens, jax.Array) else np
    zeros = xp.zeros_like(tokens[..., :by])
    moved = xp.concatenate([zeros, tokens[..., :-by]], -1)
    there = xp.concatenate([zeros - 1, segment_ids[..., :-by]], -1)
    return xp.where(there == segment_ids, moved, 0)


class WithPairs(TrainStep):
    """Its loss reads all vectors of the pairs' rows."""

    def _loss(self, params, rows, row_sums, batch, index, dropped, scored):
        loss, rest = super()._loss(params, rows, row_sums, batch, index, dropped, scored)
        inverse_BxLxK, order = index["pairs"]
        opened, total = open_rows(rows["pairs"]), 0.0
        real = (batch.segment_ids > 0)[..., None, None]
        for vector in range(3):
            values_BxLxKxF, thread = lookup(opened, vector, inverse_BxLxK, order, self.mesh)
            opened = dataclasses.replace(opened, thread=thread)
            total += jnp.sum(jnp.sin((vector + 1) * values_BxLxKxF) * real) / scored
        return loss + close_rows(total, opened, self.mesh), rest


@pytest.fixture
def make_step(monkeypatch, tiny_config, device_mesh):
    """make_step(shape, **overrides): a step of a model with both memories."""
    stem_alone = catalogue.memories

    def memories(config):
        return stem_alone(config) | {"pairs": Pairs()}

    for module in (catalogue, blueprint):
        monkeypatch.setattr(module, "memories", memories)
    monkeypatch.setattr(checkpoint, "MEMORIES", ("stem", "pairs"))

    def make(shape=(1, 1, 1), **overrides):
        return WithPairs(tiny_config(**SIZES, **overrides), device_mesh(shape))

    return make


def _trained(step, steps: int = STEPS):
    """The state after some steps, with rows wherever they are; and what was logged."""
    config, mesh = step.config, step.mesh
    state, stores, records = init_state(step.blueprint), {}, []
    for name, spec in step.reads.specs.items():
        if spec.offloaded:
            stores[name] = HostStore.create(spec, table_key(config, name), mesh)
    moving = {name: Prefetch(mesh, store, "lfu", 1) for name, store in stores.items()}
    try:
        loaded = {name: TableState(**prefetch.load()) for name, prefetch in moving.items()}
        state = dataclasses.replace(state, tables=state.tables | loaded)
        batches = zipf_data(config).batches
        placed = (step.place(batches.batch(number)) for number in range(steps))
        ahead = LookAhead(step, placed, steps, moving)
        schedule = make_schedule(config, steps + 1)
        for ready in ahead:
            state = ahead.place(state, ready)
            state, metrics = step.update(state, ready.batch, schedule, ready.slots, ready.sizes)
            records.append(jax.device_get(metrics) | ready.metrics)
        for name, prefetch in moving.items():
            prefetch.write_back(vars(state.tables[name]))
    finally:
        for prefetch in moving.values():
            prefetch.close()
    return state, stores, records


@pytest.fixture
def alone(make_step):
    """A step on one device, and its state after some."""
    step = make_step()
    return step, *_trained(step)


def test_its_rows_are_those_that_tokens_asked_for(alone):
    step, state, _, records = alone
    batches = zipf_data(step.config).batches
    asked = set()
    for number in range(STEPS):
        batch = batches.batch(number)
        keys = Pairs().keys(batch["tokens"], batch["segment_ids"])
        asked |= set(keys[batch["segment_ids"] > 0].reshape(-1).tolist())
    rows = step.reads.specs["pairs"].layout.row_numbers(np.array(sorted(asked)))
    touched = np.flatnonzero(np.asarray(state.tables["pairs"].last_step))
    assert sorted(rows.tolist()) == touched.tolist()
    fresh = init_state(step.blueprint).tables["pairs"].rows
    moved = np.any(np.asarray(state.tables["pairs"].rows) != np.asarray(fresh), axis=(0, 2))
    assert sorted(rows.tolist()) == np.flatnonzero(moved).tolist()
    # Metrics of each memory under its own name, and a norm of its own.
    assert records[-1]["pairs/never_touched_rows"] == KEYS - len(asked)
    assert records[-1]["pairs_grad_norm"] > 0 and records[-1]["table_grad_norm"] > 0
    assert "table/distinct_rows" in records[-1] and "pairs/distinct_rows" in records[-1]


@pytest.mark.long
@pytest.mark.little_effort
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_it_is_the_same_on_every_mesh(alone, make_step, shape):
    _, expected, _, losses = alone
    state, _, found = _trained(make_step(shape))
    for one, other in zip(found, losses, strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), abs=1e-5)
    for name, table in expected.tables.items():
        np.testing.assert_allclose(state.tables[name].rows, table.rows, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), pytest.param((2, 2, 2), marks=[pytest.mark.long, pytest.mark.little_effort])],
)
def test_rows_in_host_memory_are_the_resident_ones(make_step, shape):
    state, _, losses = _trained(make_step(shape))
    _, stores, found = _trained(make_step(shape, **{"tables.resident_rows": 512}))
    assert [float(one["loss"]) for one in found] == [float(one["loss"]) for one in losses]
    assert {"table/row_hit_rate", "pairs/row_hit_rate"} <= found[0].keys()
    for name, store in stores.items():
        whole = np.zeros_like(state.tables[name].rows).swapaxes(0, 1)
        for block in store.blocks:
            rows = slice(block.row_range.start, block.row_range.stop)
            columns = slice(block.column_range.start, block.column_range.stop)
            whole[rows, :, columns] = block.arrays["rows"]
        np.testing.assert_array_equal(
            whole, np.asarray(state.tables[name].rows).swapaxes(0, 1), err_msg=name
        )


def test_its_checkpoint_comes_back(alone, tmp_path):
    step, state, _, _ = alone
    touched = {name: int(n) for name, n in state.touched_rows.items()}
    info = CheckpointInfo(STEPS, STEPS, 0, touched, "none", {}, step.config)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(state, info, None)
        checkpoints.wait()
        items = {path.name for path in (tmp_path / "checkpoints" / str(STEPS)).iterdir()}
        assert {"table_rows", "table_slots", "pairs_rows", "pairs_moments"} <= items
        assert checkpoints.info(STEPS).touched_rows == touched
        found = checkpoints.restore(STEPS, abstract_state(step.blueprint))
    jax.tree.map(np.testing.assert_array_equal, found, state)
