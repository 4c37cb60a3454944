"""What the compiled step holds of a table: the donated state, and nothing else of its size."""

import dataclasses
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest

from benchmarks.table_step import TableStep
from stem_jax.mesh import make_mesh
from stem_jax.planning import hlo
from stem_jax.planning.topology import Topology
from stem_jax.training.batch import Batch
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import abstract_state
from stem_jax.training.step import TrainStep

pytestmark = pytest.mark.optimized

VOCAB = 16384


def compiled_update(step, **compiling):
    """The compiled update of a step, and the shape of its table's rows on a device."""
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
    state = abstract_state(step.blueprint)
    schedule = make_schedule(config, 10)
    compiled = step.update.lower(state, Batch(**fields), schedule).compile(**compiling)
    local = state.tables["stem"].rows.sharding.shard_shape(state.tables["stem"].rows.shape)
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
    assert memory.alias_size_in_bytes >= 3 * 4 * math.prod(local)


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


def _held_on_a_tpu(tiny_config, change=lambda step: None, layers=(0, 1)):
    """What a TPU's step holds beside its arguments, and what it updates in place, in tables.

    Rows of 512 MiB: a buffer of a table that fits into the chip's scratchpad (128 MiB) is put
    there, where no figure of the compiler's shows it.
    """
    sizes = {
        "vocab_size": 65536,
        "stem_layers": layers,
        "num_layers": 2,
        "ffn_dim": 2048 // len(layers),
    }
    sizes |= {"embed_dim": 128, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64}
    config = tiny_config(
        **{f"model.{name}": value for name, value in sizes.items()},
        **{"train.seq_len": 128, "tables.optimizer": "deferred_adamw"},
    )
    step = TrainStep(config, make_mesh(config.mesh, Topology.parse("v5e:1x1").devices()))
    change(step)
    options = {"exec_time_optimization_effort": -1.0}
    compiled, local = compiled_update(step, compiler_options=options)
    memory, rows = compiled.memory_analysis(), 4 * math.prod(local)
    return memory.temp_size_in_bytes / rows, memory.alias_size_in_bytes / rows


def _select_over_the_table(step):
    """The update as one would first write it: the whole new table or the whole old one."""

    def update(state, batch, schedule, slots=None, sizes=None):
        new, metrics = step._update(state, batch, schedule, slots, sizes)
        keep = jnp.isfinite(metrics["loss"])
        tables = jax.tree.map(lambda a, b: jnp.where(keep, a, b), new.tables, state.tables)
        return dataclasses.replace(new, tables=tables), metrics

    step.update = _jitted(step, update, donate_argnums=0)


def _keep_the_state(step):
    step.update = _jitted(step, step._update)


def _jitted(step, update, **options):
    placed = (step.shardings, None)
    return jax.jit(update, static_argnames="sizes", out_shardings=placed, **options)


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: no TPU compiler"
)


@needs_libtpu
@pytest.mark.parametrize(
    "layers",
    [
        pytest.param((0, 1), id="two vectors", marks=pytest.mark.long),
        pytest.param((1,), id="one vector", marks=pytest.mark.long),
    ],
)
def test_no_second_buffer_of_the_table_on_a_tpu(tiny_config, layers):
    """Whatever S is: neither another layout to gather from, nor one to scatter into."""
    beside, in_place = _held_on_a_tpu(tiny_config, layers=layers)
    assert beside < 0.5 and in_place >= 3


@needs_libtpu
@pytest.mark.long
def test_a_second_buffer_of_the_table_on_a_tpu_is_seen(tiny_config):
    """The test above can fail: the compiler does not mend these by itself."""
    beside, _ = _held_on_a_tpu(tiny_config, _select_over_the_table)
    assert beside > 1
    _, in_place = _held_on_a_tpu(tiny_config, _keep_the_state)
    assert in_place == 0


def _copies_of_all_vectors(text: str, size: int) -> list[str]:
    """What makes an array of so many numbers anew: neither in place, nor another name for one."""
    module = hlo.parse(text)
    names = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional"}
    # Kernels that write into what they are given.
    kernels = set(re.findall(r"%([\w.-]+) = .* custom-call\(.*output_to_operand_aliasing=", text))
    found = []
    for instruction, _ in module.scheduled():
        if all(math.prod(array.shape) != size for array in instruction.arrays):
            continue
        inside = {part.opcode for part in module.fused(instruction)}
        fresh = instruction.target == "AllocateBuffer"
        put = {instruction.opcode, *inside} & {"dynamic-update-slice", "scatter"}
        put = put or instruction.name in kernels
        if instruction.opcode not in names and not fresh and not put:
            found.append(f"{instruction.opcode} {instruction.arrays[0]} {instruction.op_name}")
    return found


@needs_libtpu
@pytest.mark.long
def test_no_copy_of_the_rows_of_all_vectors_on_a_tpu(tiny_config):
    """Neither on the way from the owners through a scan over two STEM layers, nor back."""
    sizes = {"vocab_size": 65536, "num_layers": 4, "stem_layers": (1, 3), "ffn_dim": 384}
    sizes |= {"embed_dim": 128, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64}
    config = tiny_config(
        **{f"model.{name}": value for name, value in sizes.items()},
        **{"model.scan_layers": True, "model.compute_dtype": "bfloat16", "train.seq_len": 128},
        **{"train.global_batch_size": 8, "tables.optimizer": "deferred_adamw"},
    )
    step = TrainStep(config, make_mesh(config.mesh, Topology.parse("v5e:2x2").devices()))
    compiled, _ = compiled_update(step, compiler_options={"exec_time_optimization_effort": -1.0})
    keys = jax.ShapeDtypeStruct((1, 8, 128), jnp.int32)
    rows = step.reads.tables(Batch(*[keys] * 5))["stem"].exchange.unique_rows
    size = 2 * rows * 384
    text = compiled.as_text()
    assert f"[2,{rows},384]" in text
    assert not _copies_of_all_vectors(text, size)
