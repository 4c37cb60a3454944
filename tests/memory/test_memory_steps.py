"""All memories in one model: what a step makes of them does not depend on how it is made."""

import jax
import numpy as np
import pytest

from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import init_state
from stem_jax.training.step import TrainStep

MEMORIES = {
    "model.num_layers": 3,
    "model.stem_layers": (1,),
    "value.layers": (0, 2),
    "per_layer.layers": (0, 1, 2),
    "per_layer.width": 12,
    "ngram.layers": (0, 2),
    "ngram.heads": 2,
    "ngram.keys_per_head": 100,
    "ngram.width": 32,
    "ngram.eos_id": 2,
}
UPDATES = 3


@pytest.fixture(scope="module")
def updates(tiny_config, device_mesh, make_batch):
    """updates(mesh shape, **overrides): the state after some updates, and what was logged."""

    def make(shape=(1, 1, 1, 1), **overrides):
        step = TrainStep(tiny_config(**MEMORIES | overrides), device_mesh(shape))
        state, records = init_state(step.blueprint), []
        schedule = make_schedule(step.config, UPDATES + 1)
        for seed in range(UPDATES):
            state, metrics = step.update(state, make_batch(step, seed, ragged=True), schedule)
            records.append(jax.device_get(metrics))
        return state, records

    return make


@pytest.fixture(scope="module")
def alone(updates):
    return updates()


@pytest.mark.long
@pytest.mark.little_effort
@pytest.mark.parametrize(
    ("shape", "overrides"),
    [
        ((1, 1, 1, 1), {"train.micro_batches": 2}),
        ((1, 1, 1, 1), {"model.scan_layers": True}),
        ((1, 1, 2, 1), {}),
        ((2, 1, 2, 2), {"tables.vocab_axes": ("data", "context")}),
        ((1, 1, 1, 1), {"model.remat": "full"}),
    ],
    ids=["micro-batches", "scanned", "context", "context and more", "rematerialised"],
)
def test_a_step_is_the_same_however_it_is_made(alone, updates, shape, overrides):
    expected, records = alone
    state, found = updates(shape, **overrides)
    for one, other in zip(found, records, strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), abs=1e-5)
        for name in ("grad_norm", "table_grad_norm", "value_grad_norm", "ngram_grad_norm"):
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-4), name
    assert state.tables.keys() == {"stem", "value", "per_layer", "ngram"}
    for name, table in expected.tables.items():
        np.testing.assert_allclose(state.tables[name].rows, table.rows, atol=2e-5, err_msg=name)
        np.testing.assert_array_equal(state.tables[name].last_step, table.last_step)
