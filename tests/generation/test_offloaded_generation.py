"""Generation with some rows on the device and the rest on the host: the same tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.loading import load_run
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.errors import InputError
from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling
from stem_jax.memory.catalogue import table_specs
from stem_jax.tables.spec import TableState, table_shardings
from stem_jax.training.blueprint import Blueprint
from stem_jax.training.state import TrainState, init_state

BYTES = load_tokenizer("bytes")
PROMPTS = ["abc", "one more.", "a longer prompt: 123"]
UPDATES = 40


@pytest.fixture(scope="module")
def run_folder(tiny_config, device_mesh, tmp_path_factory):
    """A checkpoint whose rows lag behind by different numbers of updates."""
    folder = tmp_path_factory.mktemp("run")
    BYTES.save(folder / "tokenizer")
    sizes = {"model.vocab_size": 258, "model.num_layers": 2, "model.stem_layers": (1,)}
    config = tiny_config(**sizes, **{"train.seq_len": 48, "mesh.data": 1})
    mesh, rng = device_mesh((1, 1, 1)), np.random.default_rng(0)
    state = init_state(Blueprint(config, mesh))
    shape = state.tables["stem"].rows.shape
    root = 10.0 ** rng.uniform(-4, -2, shape)
    table = TableState(
        rows=state.tables["stem"].rows + rng.normal(size=shape).astype(np.float32),
        mu=jnp.asarray(root * rng.uniform(-1, 1, shape), jnp.float32),
        nu=jnp.asarray(root**2, jnp.float32),
        last_step=jnp.asarray(rng.integers(1, UPDATES + 1, shape[1]), jnp.int32),
    )
    table = jax.device_put(table, table_shardings(table_specs(config)["stem"], mesh))
    params = {name: 3 * value for name, value in state.params.items()}
    counters = [jnp.int32(number) for number in (UPDATES, UPDATES, 0)]
    touched = {"stem": jnp.int32(258)}
    state = TrainState(*counters, touched, params, state.opt_state, {"stem": table})
    info = CheckpointInfo(
        UPDATES, UPDATES, 0, {"stem": 258}, BYTES.fingerprint, {"seed": 0}, config
    )
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(state, info, None)
    return folder


def _tokens(run, sampling, tokens=20):
    generator = Generator(run.config, run.params, run.rows, run.tokenizer, run.mesh)
    return [c.tokens for c in generator.complete(PROMPTS, tokens, sampling)]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(3.0, 0, 1.0)])
@pytest.mark.parametrize("resident_rows", [26, 64])
def test_offloaded_rows_give_the_same_tokens(run_folder, sampling, resident_rows):
    resident, offloaded = load_run(run_folder), load_run(run_folder, resident_rows=resident_rows)
    # The device holds these rows and no more.
    served = offloaded.rows["stem"].serve(jnp.arange(5))
    assert served.rows.shape[1] == resident_rows
    assert _tokens(offloaded, sampling) == _tokens(resident, sampling)
    offloaded.close()


def test_offloaded_rows_are_the_caught_up_ones(run_folder):
    resident, offloaded = load_run(run_folder), load_run(run_folder, resident_rows=32)
    for first in (0, 96, 224, 32):
        keys = np.arange(first, first + 32, dtype=np.int32)
        rows, inverse = offloaded.rows["stem"].serve(keys).block(keys, jnp.float32)
        expected, places = resident.rows["stem"].block(jnp.asarray(keys), jnp.float32)
        np.testing.assert_allclose(rows[:, inverse], expected[:, places], atol=1e-7)
    offloaded.close()


def test_a_prompt_is_deduplicated(run_folder):
    run = load_run(run_folder, resident_rows=16)
    keys = np.tile(np.arange(8, dtype=np.int32), (2, 40))
    rows, inverse = run.rows["stem"].serve(keys).block(keys, jnp.float32)
    assert (rows.shape[1], inverse.shape) == (8, keys.shape)
    run.close()


def test_more_distinct_tokens_than_slots_are_refused(run_folder):
    run = load_run(run_folder, resident_rows=4)
    with pytest.raises(InputError, match=r"distinct tokens.*resident_rows=4.*--resident-rows="):
        _tokens(run, Sampling())
    run.close()
    with pytest.raises(InputError, match="resident_rows=0 must be more than 0"):
        load_run(run_folder, resident_rows=0)


def test_no_row_travels_back(run_folder, monkeypatch):
    run = load_run(run_folder, resident_rows=16)
    store = run.rows["stem"]._prefetch.store
    monkeypatch.setattr(store, "write", lambda *_: pytest.fail("rows do not change here"))
    for first in range(0, 96, 16):
        jax.block_until_ready(
            run.rows["stem"].serve(np.arange(first, first + 16, dtype=np.int32)).rows
        )
    run.close()
