"""What the compiler is told goes with a step's programs, whoever compiles them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stem_jax.compiler_options import compiler_options
from stem_jax.planning import gpus, hlo
from stem_jax.planning.compiled import compile_program
from stem_jax.planning.program import train_step_program
from stem_jax.planning.topology import Topology
from stem_jax.training import step

pytestmark = pytest.mark.optimized


@pytest.mark.parametrize("kind", ["cpu", "AMD Instinct MI300X", "TPU v4", "TPU v5 lite", "TPU v5e"])
def test_no_options_where_none_are_known_to_compile(kind):
    assert compiler_options(SimpleNamespace(device_kind=kind)) == {}


def test_all_to_alls_are_asynchronous_on_v5p():
    pytest.importorskip("libtpu")
    device = Topology.parse("v5p:2x2x2").devices()[0]
    assert compiler_options(device) == {"xla_tpu_enable_async_all_to_all": True}


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
