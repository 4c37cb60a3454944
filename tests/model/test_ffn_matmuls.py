"""What a TPU fuses into the matmuls of a gated FFN, read in its program."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from stem_jax.mesh import BATCH_AXES, make_mesh, parameter_spec
from stem_jax.model.feed_forward import kinds_of
from stem_jax.model.kind import Read
from stem_jax.planning import hlo
from stem_jax.planning.charges import holds_matmul
from stem_jax.planning.topology import Topology

pytestmark = [
    pytest.mark.optimized,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed: no TPU compiler",
    ),
]
SIZES = {"embed_dim": 512, "ffn_dim": 2048, "num_layers": 2, "compute_dtype": "bfloat16"}


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "stem"])
def test_no_matmul_makes_the_gated_values_or_their_gradients_anew(layer, tiny_config):
    keys = {f"model.{name}": value for name, value in SIZES.items()}
    config = tiny_config(**keys, **{"model.stem_layers": "1"})
    mesh = make_mesh(config.mesh, Topology.parse("v5e:1x1").devices())

    def described(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def placed(variable):
        axes = variable.get_metadata()["logical_axes"]
        return variable.replace(described(variable.shape, variable.dtype, parameter_spec(axes)))

    kind = kinds_of(config.model)[layer]
    made = nnx.eval_shape(lambda: kind(config.model, 1.0, None, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(made)
    state = jax.tree.map(placed, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    batch = PartitionSpec(BATCH_AXES)
    x = described((2, 2048, 512), jnp.bfloat16, batch)
    up = described((2, 2048, 2048), jnp.bfloat16, batch) if layer else None

    def gradients(state, x, up, gradient):
        run = jax.checkpoint(
            lambda state, x, up: nnx.merge(graph, state)(x, Read(None, None, up))[0]
        )
        return jax.vjp(run, state, x, up)[1](gradient)

    lowered = jax.jit(gradients).lower(state, x, up, x)
    options = {"exec_time_optimization_effort": -1.0}
    module = hlo.parse(lowered.compile(compiler_options=options).as_text())
    matmuls = [i for i, _ in module.scheduled() if holds_matmul(module, i)]
    # What the gate is needed for comes out of the one matmul that recomputes it, and of the one
    # that makes the gradient of the gated values; no other reads the gate.
    assert len(matmuls) == (8 if layer == 0 else 5)
    gated = [
        i
        for i in matmuls
        if any(inner.opcode in ("exponential", "logistic") for inner in module.fused(i))
    ]
    assert len(gated) <= 2
