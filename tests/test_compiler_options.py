"""What the compiler is told goes with a step's programs, whoever compiles them."""

import jax
import pytest

from stem_jax.compiler_options import compiler_options
from stem_jax.planning.compiled import compile_program
from stem_jax.planning.program import train_step_program
from stem_jax.training import step


def test_only_where_a_platform_knows_them():
    assert compiler_options("cpu") == compiler_options("gpu") == {}
    assert compiler_options("tpu") == {"xla_tpu_enable_async_all_to_all": True}


def test_a_plan_compiles_with_the_options_of_the_step(monkeypatch, tiny_config, device_mesh):
    asked = []

    def unknown(platform):
        asked.append(platform)
        return {"xla_no_such_option": True}

    monkeypatch.setattr(step, "compiler_options", unknown)
    program = train_step_program(tiny_config(), device_mesh((8, 1, 1)))
    assert asked == ["cpu"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        compile_program(program)
