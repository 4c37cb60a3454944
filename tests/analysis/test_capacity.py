"""Parameters that a context touches, against the rows that programs read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.analysis.capacity import distinct_tokens, measure_capacity, touched_parameters
from stem_jax.tables.row_source import ResidentRows
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import init_state


@pytest.mark.parametrize("length", [1, 64])
def test_as_many_parameters_are_counted_as_the_row_block_depends_on(train_step, length):
    step = train_step()
    table = init_state(step.blueprint).tables["stem"]
    ids = np.random.default_rng(length).integers(0, 88, length, dtype=np.int32) % 50

    def read(rows):
        block, inverse = ResidentRows(rows, step.reads.specs["stem"], step.mesh).block(
            ids[None], jnp.float32
        )
        return block[:, inverse].sum()

    # A parameter of the table is touched if what is read changes with it.
    gradient = np.asarray(jax.grad(read)(table.rows))
    model = step.config.model
    assert touched_parameters(model, distinct_tokens(ids)) == np.count_nonzero(gradient)


def test_the_block_of_a_step_holds_as_many(train_step, make_batch):
    step = train_step()
    state = init_state(step.blueprint)
    batch = make_batch(step)
    schedule = make_schedule(step.config, 2)
    # All rows are ones, and what fills the block up is zero.
    ones = jnp.ones_like(state.tables["stem"].rows)

    @jax.jit
    def block(rows, batch):
        table = step.reads.tables(batch)["stem"]
        requests = table.request(batch.tokens, batch.segment_ids > 0, None)
        return table.fetch(rows, requests, jnp.float32, 0, schedule.tables["stem"])

    read = np.asarray(block(dataclasses.replace(state.tables["stem"], rows=ones), batch))
    distinct = distinct_tokens(np.asarray(batch.tokens))
    assert np.count_nonzero(read) == touched_parameters(step.config.model, distinct)


def test_windows_are_those_of_the_text(tiny_config):
    model = tiny_config().model
    # Every window of 8 has the same eight tokens, the text twice as many.
    ids = np.concatenate([np.tile(np.arange(8), 8), np.tile(np.arange(8, 16), 8)])
    found = measure_capacity(model, ids, 16)
    assert [c.length for c in found.lengths] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert [c.windows for c in found.lengths] == [64, 64, 32, 16, 8, 4, 2, 1]
    row = 2 * 48
    assert [c.distinct for c in found.lengths] == [1, 2, 4, 8, 8, 8, 8, 16]
    assert found.lengths[3].low == found.lengths[3].high == found.lengths[3].parameters == 8 * row
    assert (found.replaced, found.table, found.context) == (2 * 32 * 48, 88 * row, 16)
    assert found.overtakes() is None
    more = measure_capacity(model, np.arange(88), 16)
    assert more.overtakes() == 64


def test_a_text_that_is_no_power_of_two_is_read_to_its_end(tiny_config):
    found = measure_capacity(tiny_config().model, np.arange(70) % 40, 16)
    assert found.lengths[-1].length == 64
    assert [c.windows for c in found.lengths[-2:]] == [2, 1]
