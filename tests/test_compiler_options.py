"""What the compiler is told goes with a step's programs, whoever compiles them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stem_jax.compiler_options import compiler_options, has_async_all_to_alls
from stem_jax.mesh import make_mesh
from stem_jax.planning import gpus, hlo
from stem_jax.planning.compiled import compile_program
from stem_jax.planning.overlap import covered_seconds
from stem_jax.planning.program import train_step_program
from stem_jax.planning.topology import Topology
from stem_jax.training import step

pytestmark = pytest.mark.optimized


@pytest.mark.parametrize("kind", ["cpu", "AMD Instinct MI300X", "TPU v4", "TPU v5 lite", "TPU v5e"])
def test_no_options_where_none_are_known_to_compile(kind):
    assert compiler_options(SimpleNamespace(device_kind=kind)) == {}
    assert not has_async_all_to_alls(SimpleNamespace(device_kind=kind))


def test_all_to_alls_are_asynchronous_on_v5p():
    pytest.importorskip("libtpu")
    device = Topology.parse("v5p:2x2x2").devices()[0]
    assert compiler_options(device) == {"xla_tpu_enable_async_all_to_all": True}
    assert has_async_all_to_alls(device)


@pytest.mark.long
def test_rows_travel_under_matmuls_on_v5p(tiny_config):
    """Layers d s d s d: the scan begins at the second, and the first one covers both ways."""
    pytest.importorskip("libtpu")
    sizes = {"vocab_size": 1024, "embed_dim": 512, "ffn_dim": 2048, "num_kv_heads": 4}
    layers = {"num_layers": 5, "stem_layers": (1, 3), "scan_layers": True, "remat": "full"}
    config = tiny_config(
        **{f"model.{key}": value for key, value in (sizes | layers).items()},
        **{"model.compute_dtype": "bfloat16", "train.seq_len": 1024, "mesh.data": -1},
        **{"train.global_batch_size": 16},
    )
    topology = Topology.parse("v5p:2x2x1")
    mesh = make_mesh(config.mesh, topology.devices())
    module = compile_program(train_step_program(config, mesh), full_effort=True).module
    swaps = {i.name: 1e9 for i, _ in module.scheduled() if i.opcode.startswith("all-to-all-start")}
    # Matmuls between start and end, since each takes a second.
    found = covered_seconds(module, swaps, lambda matmul: 1.0)
    covered = [found[name] for name in swaps]
    # Requests, then the rows of two vectors, then their gradients.
    assert len(covered) == 5
    assert sum(covered[1:3]) > 0
    assert sum(covered[3:]) > 0


@pytest.mark.skipif(gpus.missing() is not None, reason=f"{gpus.missing()}: {gpus.INSTALL_CUDA}")
def test_gathers_of_gpus_run_under_matmuls():
    """The second weights of two come from the other GPU while the first are multiplied."""
    devices = Topology.parse("h100:2").devices()
    options = compiler_options(devices[0])
    assert options == {"xla_gpu_enable_latency_hiding_scheduler": True}
    mesh = Mesh(np.array(devices), "d")

    def whole(weights):
        return jax.lax.with_sharding_constraint(weights, NamedSharding(mesh, PartitionSpec()))

    def layers(x, first, second):
        return jnp.tanh(jnp.tanh(x @ whole(first)) @ whole(second))

    place = NamedSharding(mesh, PartitionSpec("d"))
    # Smaller gathers would be made one.
    square = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16, sharding=place)
    lowered = jax.jit(layers, compiler_options=options).lower(square, square, square)
    module = hlo.parse(lowered.compile(gpus.OPTIONS).as_text())
    order = [
        i.opcode for i, _ in module.scheduled() if "gather" in i.opcode or i.opcode == "fusion"
    ]
    gather = ["all-gather-start", "all-gather-done"]
    assert order == [*gather, gather[0], "fusion", gather[1], "fusion"]


def test_a_plan_compiles_with_the_options_of_the_step(monkeypatch, tiny_config, device_mesh):
    asked = []

    def unknown(device):
        asked.append(device)
        return {"xla_no_such_option": True}

    monkeypatch.setattr(step, "compiler_options", unknown)
    mesh = device_mesh((8, 1, 1))
    program = train_step_program(tiny_config(), mesh)
    assert asked == [mesh.devices.flat[0]]
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        compile_program(program)
