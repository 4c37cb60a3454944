"""A table larger than a device, divided over two: the same tokens, half the memory, no transfer."""

import dataclasses
import importlib.util
import random

import jax
import jax.numpy as jnp
import pytest

from stem_jax.checkpoints.inference_mesh import inference_mesh
from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling
from stem_jax.memory.catalogue import table_specs
from stem_jax.mesh import make_mesh
from stem_jax.planning import hlo
from stem_jax.planning.collectives import collectives_of
from stem_jax.planning.topology import Topology
from stem_jax.serving.engine import Engine
from stem_jax.serving.programs import Programs
from stem_jax.serving.request import Request
from stem_jax.serving.slot_state import Settings
from stem_jax.tables.row_source import ResidentRows
from stem_jax.training.blueprint import Blueprint
from stem_jax.training.state import abstract_state, init_state
from tests.engine_requests import Heard, alone

# Rows of 128 MiB, beside 3 MiB of other parameters.
SIZES = {"vocab_size": 8192, "num_layers": 2, "stem_layers": (0, 1), "ffn_dim": 2048}
# Two devices share the heads, or, where they are three, divide the batch.
HEADS = {"tensor": {"num_heads": 4, "num_kv_heads": 2}, "fsdp": {"num_heads": 3, "head_dim": 8}}
HEADS["fsdp"]["num_kv_heads"] = 1
SLOTS, LENGTH = 4, 16


@pytest.fixture(params=["tensor", pytest.param("fsdp", marks=pytest.mark.long)])
def axis(request):
    return request.param


@pytest.fixture
def config(tiny_config, axis):
    keys = {f"model.{name}": size for name, size in {**SIZES, **HEADS[axis]}.items()}
    # Rows that no optimizer moves have no moments beside them.
    others = {"train.seq_len": 32, "mesh.data": 1, "optimizer.train": "backbone"}
    return tiny_config(**keys, **others)


def _shape(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _programs(config, mesh) -> dict[str, jax.stages.Lowered]:
    """Prefill and decode of the generator, and the engine's three, lowered from shapes."""
    state = abstract_state(Blueprint(config, mesh))
    specs, dtype = table_specs(config), jnp.dtype(config.model.param_dtype)
    params = {
        name: jax.ShapeDtypeStruct(p.shape, dtype, sharding=p.sharding)
        for name, p in state.params.items()
    }
    rows = {
        name: ResidentRows(
            jax.ShapeDtypeStruct(t.rows.shape, dtype, sharding=t.rows.sharding), specs[name], mesh
        )
        for name, t in state.tables.items()
    }
    generator = Generator(config, params, rows, None, mesh)
    tokens, numbers = _shape(SLOTS, LENGTH), _shape(SLOTS)
    seeds, scalars = _shape(SLOTS, dtype=jnp.uint32), Sampling().scalars()
    prompt = params, rows, tokens, numbers, seeds, scalars
    prefill = generator.prefill.lower(*prompt, slots=2 * LENGTH)
    _, state = generator.prefill.eval_shape(*prompt, slots=2 * LENGTH)
    found = {
        "prefill": prefill,
        "decode": generator.decode.lower(params, rows, numbers, scalars, state=state),
    }
    programs = Programs(generator, SLOTS)
    state = programs.shapes(rows)
    two = _shape(2)
    how = (_shape(2, dtype=d) for d in (jnp.uint32, jnp.float32, jnp.int32, jnp.float32))
    part = params, rows, _shape(2, LENGTH), two, two, Settings(*how), _shape()
    active = _shape(SLOTS, dtype=bool)
    step = programs.decode.lower(params, rows, active, _shape(), state=state, window=LENGTH)
    return found | {
        "begin": programs.begin.lower(*part, state=state),
        "go on": programs.go_on.lower(*part, state=state),
        "step": step,
    }


def _check(config, mesh, lowered) -> None:
    """Each device needs at most 55% of the table's bytes, and none of it goes to the other."""
    compiled = lowered.compile()
    itemsize = jnp.dtype(config.model.param_dtype).itemsize
    table = sum(s.num_rows * s.row_size for s in table_specs(config).values()) * itemsize
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    held += memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert table / mesh.size < held <= 0.55 * table
    sent = collectives_of(hlo.parse(compiled.as_text()), [0] * mesh.size)
    assert sent
    assert max(collective.bytes for collective in sent) < table / 100


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["prefill", "decode", "begin", "go on", "step"])
def test_each_device_needs_half_of_the_table(config, axis, name):
    placed, mesh = inference_mesh(config, 2)
    assert mesh.shape[axis] == mesh.size == 2
    _check(placed, mesh, _programs(placed, mesh)[name])


@pytest.mark.long
def test_two_devices_say_what_one_says(config):
    rng = random.Random(0)
    requests = [
        Request(
            tuple(rng.randrange(8192) for _ in range(length)),
            8,
            Sampling(1.0, 50, 0.9) if length % 2 else Sampling(temperature=0.0),
            length,
        )
        for length in (1, 7, 12, 20)
    ]
    said = []
    for devices in (1, 2):
        placed, mesh = inference_mesh(config, devices)
        state = init_state(Blueprint(placed, mesh))
        rows = {
            name: ResidentRows(table.rows, table_specs(placed)[name], mesh)
            for name, table in state.tables.items()
        }
        params = {name: 3 * value for name, value in state.params.items()}
        model = placed, params, rows, None, mesh
        said.append([alone(Generator(*model), request) for request in requests])
    engine = Engine(*model, slots=2)
    engine.start()
    heard = [Heard() for _ in requests]
    for request, ears in zip(requests, heard, strict=True):
        engine.submit(request, ears)
    said.append([ears.tokens() for ears in heard])
    engine.close()
    assert said[0] == said[1] == said[2]


def _of_chips(tiny_config, chips: int):
    """A model with rows of 24 GiB in bfloat16, and a mesh of chips of a v5e, each of 16 GiB."""
    sizes = {"vocab_size": 393216, "num_layers": 2, "stem_layers": (0, 1), "ffn_dim": 16384}
    sizes |= {"embed_dim": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 128}
    keys = {f"model.{name}": size for name, size in sizes.items()}
    dtypes = {"model.param_dtype": "bfloat16", "model.compute_dtype": "bfloat16"}
    config = tiny_config(**keys, **dtypes, **{"train.seq_len": 512, "mesh.data": 1})
    placed = dataclasses.replace(config.mesh.on_one_device(), tensor=chips)
    mesh = make_mesh(placed, Topology.parse("v5e:2x2").devices()[:chips])
    return dataclasses.replace(config, mesh=placed), mesh


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("prefill", "begin", "go on")),
        "decode",
        "step",
    ],
)
def test_two_chips_hold_a_table_of_one_and_a_half(tiny_config, name):
    config, mesh = _of_chips(tiny_config, 2)
    _check(config, mesh, _programs(config, mesh)[name])


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
def test_one_chip_does_not_hold_it(tiny_config):
    config, mesh = _of_chips(tiny_config, 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        _programs(config, mesh)["decode"].compile()
