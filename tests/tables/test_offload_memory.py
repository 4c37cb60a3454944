"""What the compiled programs of an offloaded table hold: the donated slots, nothing of their size.

The step and the programs that move rows; see `test_table_memory` for resident tables.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.tables.host_store import HostStore
from stem_jax.tables.prefetch import Prefetch
from stem_jax.tables.slot_shards import SlotShards
from stem_jax.training.batch import Batch
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import abstract_state

pytestmark = pytest.mark.optimized

VOCAB, RESIDENT = 16384, 4096
# In place: what scatters into the donated buffer, or loops over it. A copy, a broadcast of zeros or
# a select over all slots would be a buffer of its own.
IN_PLACE = {"parameter", "get-tuple-element", "scatter", "dynamic-update-slice", "fusion"}
IN_PLACE |= {"bitcast", "while", "call", "tuple"}
MESHES = [(1, 1, 1), (2, 2, 2)]


@pytest.fixture(scope="module")
def offloaded(train_step):
    """offloaded(mesh shape): a train step and its abstract table."""

    def make(shape):
        step = train_step(shape, **{"model.vocab_size": VOCAB, "tables.resident_rows": RESIDENT})
        return step, abstract_state(step.blueprint)

    return make


def shard_shapes(table) -> dict[str, tuple[int, ...]]:
    return {name: a.sharding.shard_shape(a.shape) for name, a in vars(table).items()}


def defined(compiled, table) -> set[str]:
    """Opcodes of the instructions that define an array of the shape of rows, mu and nu.

    last_step is left out: it is summed over, and has one number for a row.
    """
    dims = ",".join(map(str, shard_shapes(table)["rows"]))
    opcodes = re.findall(rf"= f32\[{dims}\]\S* ([a-z-]+)\(", compiled.as_text())
    assert "parameter" in opcodes
    return set(opcodes)


def addresses(arrays) -> dict[str, list[int]]:
    return {
        name: [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]
        for name, array in arrays.items()
    }


def donated_bytes(table) -> int:
    shapes = shard_shapes(table)
    rows = shapes["rows"]
    return 4 * (3 * math.prod(rows) + rows[1])


@pytest.mark.parametrize("shape", MESHES)
def test_the_step_has_no_second_buffer_of_the_slots(offloaded, shape):
    step, state = offloaded(shape)
    assert state.tables["stem"].rows.shape[1] == RESIDENT
    A, B, L = 1, step.config.train.global_batch_size, step.config.train.seq_len
    ids = jax.ShapeDtypeStruct((A, B, L), jnp.int32, sharding=step.batch_sharding)
    mask = jax.ShapeDtypeStruct((A, B, L), bool, sharding=step.batch_sharding)
    batch = Batch(ids, ids, ids, ids, mask)
    table = step.reads.tables(batch)["stem"]
    room, owners = table.largest_sizes.owned, table.exchange.num_owners
    slots = jax.ShapeDtypeStruct(
        (owners * room,), jnp.int32, sharding=state.tables["stem"].last_step.sharding
    )
    schedule = make_schedule(step.config, 10)
    compiled = step.update.lower(state, batch, schedule, {"stem": slots}).compile()
    assert defined(compiled, state.tables["stem"]) <= IN_PLACE
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= donated_bytes(state.tables["stem"])
    # Nor one of the whole table, which is four times as large.
    local = shard_shapes(state.tables["stem"])["rows"]
    assert f"[{local[0]},{VOCAB // RESIDENT * local[1]},{local[2]}]" not in compiled.as_text()


@pytest.mark.parametrize("shape", MESHES)
def test_moving_rows_has_no_second_buffer_of_the_slots(offloaded, shape):
    step, state = offloaded(shape)
    room, spec = 32, step.reads.specs["stem"]
    store = HostStore.allocate(spec, step.mesh)
    with Prefetch(step.mesh, store, "lfu", 2) as prefetch:
        arrays = prefetch.load()
    shards = SlotShards(step.mesh, spec, store.fields)
    places = dict.fromkeys(shards.devices, np.arange(room, dtype=np.int32))
    columns = spec.width // step.mesh.shape["tensor"]
    fields = {f.name: np.zeros(spec.shape(f.name, room, columns), f.dtype) for f in spec.fields}
    staged = shards.staged(dict.fromkeys(shards.devices, fields))
    apart, lines = shards._apart(arrays), shards._lines(places)
    read = shards._read.lower(apart, lines).compile()
    write = shards._write.lower(apart, staged, lines).compile()
    # Taken apart and put together again, they lie where they lay.
    del apart
    before = addresses(arrays)
    assert addresses(shards.swap(arrays, staged, places)[1]) == before
    table_bytes = donated_bytes(state.tables["stem"])
    assert defined(read, state.tables["stem"]) == {"parameter"}
    assert read.memory_analysis().output_size_in_bytes < table_bytes / 16
    assert defined(write, state.tables["stem"]) <= IN_PLACE
    # Donated and given back in place.
    assert write.memory_analysis().alias_size_in_bytes >= table_bytes
    for program in (read, write):
        assert program.memory_analysis().temp_size_in_bytes < table_bytes / 16
