"""The count of rows that some update had: of the whole table, by a look at the batch's alone."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import abstract_state, init_state

VOCAB = 4096


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_rows_are_counted_when_an_update_first_has_them(train_step, make_batch, shape):
    step = train_step(shape)
    state, schedule = init_state(step.blueprint), make_schedule(step.config, 8)
    counts = []
    for seed in (0, 0, 1, 2):
        if seed == 2:
            # Skipped: no row is updated.
            bad = jax.tree.map(lambda p: p * jnp.nan, state.params)
            state = dataclasses.replace(state, params=bad)
        state, _ = step.update(state, make_batch(step, seed=seed, ragged=True), schedule)
        counts.append(int(state.touched_rows["stem"]))
        assert counts[-1] == np.count_nonzero(state.tables["stem"].last_step)
    assert 0 < counts[0] == counts[1] < counts[2] == counts[3]


def test_no_sum_over_the_table(train_step, make_batch):
    """None of the reductions of a step, in the program as it is written, is of all rows."""
    step = train_step((1, 1, 1), **{"model.vocab_size": VOCAB})
    num_rows = step.reads.specs["stem"].num_rows
    state, schedule = abstract_state(step.blueprint), make_schedule(step.config, 8)
    text = step.update.lower(state, make_batch(step), schedule).as_text()
    reduced = re.findall(r"stablehlo.reduce\(.*?: \(tensor<([\dx]*)x\w+>", text)
    assert f"tensor<{num_rows}xi32>" in text and reduced
    assert not [sizes for sizes in reduced if sizes == str(num_rows)]
