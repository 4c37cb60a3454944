"""What the compiled step holds of a table: the donated state, and nothing else of its size."""

import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks.table_step import TableStep
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import abstract_state
from stem_jax.training.step import Batch

VOCAB = 16384


def compiled_update(step):
    """The compiled update of a step, and its table's shape and bytes per device."""
    config = step.config
    shape = (1, config.train.global_batch_size, config.train.seq_len)
    fields = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=step.batch_sharding)
        for name, dtype in (
            ("tokens", jnp.int32),
            ("targets", jnp.int32),
            ("positions", jnp.int32),
            ("segment_ids", jnp.int32),
            ("loss_mask", bool),
        )
    }
    state = abstract_state(config, step.model, step.mesh)
    schedule = make_schedule(config, 10)
    compiled = step.update.lower(state, Batch(**fields), schedule).compile()
    local = state.table.rows.sharding.shard_shape(state.table.rows.shape)
    return compiled, local


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_no_second_buffer_of_the_table(train_step, shape):
    step = train_step(shape, **{"model.vocab_size": VOCAB, "tables.optimizer": "deferred_adamw"})
    compiled, local = compiled_update(step)
    dims = ",".join(map(str, local))
    # Instructions that define a value of the table's shape, by opcode.
    defined = re.findall(rf"= f32\[{dims}\]\S* ([a-z-]+)\(", compiled.as_text())
    assert "parameter" in defined
    # In place: what scatters or loops over the donated buffer. A copy, a broadcast of zeros or a
    # select over the whole table would be a buffer of its own.
    in_place = {"parameter", "get-tuple-element", "scatter", "dynamic-update-slice", "fusion"}
    in_place |= {"bitcast", "while", "call", "tuple"}
    assert set(defined) <= in_place, sorted(set(defined) - in_place)
    memory = compiled.memory_analysis()
    table_bytes = 4 * local[0] * local[1] * local[2]
    assert memory.alias_size_in_bytes >= 3 * table_bytes


@pytest.mark.parametrize("optimizer", ["deferred_adamw", "lazy_adamw"])
def test_temporaries_follow_the_batch_not_the_table(optimizer):
    step = TableStep(VOCAB, 64, optimizer)
    keys = jax.ShapeDtypeStruct((1, 1, 64), jnp.int32)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    program = step.program.lower(step.state, keys, number, step.history).compile()
    assert program.memory_analysis().temp_size_in_bytes < step.state.rows.nbytes / 16


def test_dense_adamw_does_hold_a_second_one():
    step = TableStep(VOCAB, 64, "dense_adamw")
    keys = jax.ShapeDtypeStruct((1, 1, 64), jnp.int32)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    program = step.program.lower(step.state, keys, number, step.history).compile()
    assert program.memory_analysis().temp_size_in_bytes >= step.state.rows.nbytes
