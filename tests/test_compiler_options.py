"""What the compiler is told goes with a step's programs, whoever compiles them."""

from types import SimpleNamespace

import jax
import pytest

from stem_jax.compiler_options import compiler_options
from stem_jax.planning.compiled import compile_program
from stem_jax.planning.program import train_step_program
from stem_jax.planning.topology import Topology
from stem_jax.training import step

pytestmark = pytest.mark.optimized


@pytest.mark.parametrize(
    "kind", ["cpu", "NVIDIA H100 80GB HBM3", "TPU v4", "TPU v5 lite", "TPU v5e"]
)
def test_no_options_where_none_are_known_to_compile(kind):
    assert compiler_options(SimpleNamespace(device_kind=kind)) == {}


def test_all_to_alls_are_asynchronous_on_v5p():
    pytest.importorskip("libtpu")
    device = Topology.parse("v5p:2x2x2").devices()[0]
    assert compiler_options(device) == {"xla_tpu_enable_async_all_to_all": True}


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
