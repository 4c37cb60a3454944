"""What a TPU's program does between projections and the attention kernel, read after compiling."""

import collections
import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from stem_jax.mesh import BATCH_AXES, make_mesh, parameter_spec
from stem_jax.model.feed_forward import KINDS
from stem_jax.model.inputs import Inputs
from stem_jax.model.layer_rows import LayerVectors
from stem_jax.model.rotary import rotary_angles
from stem_jax.model.transformer import Block
from stem_jax.planning import hlo
from stem_jax.planning.topology import Topology

pytestmark = [
    pytest.mark.optimized,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed: no TPU compiler",
    ),
]
L, Dh = 1024, 64
SIZES = {
    "embed_dim": 512,
    "num_layers": 1,
    "stem_layers": "none",
    "num_heads": 8,
    "num_kv_heads": 2,
}
SIZES |= {"head_dim": Dh, "ffn_dim": 1024, "compute_dtype": "bfloat16"}
# What has a name and a shape of its own, and no bytes.
NAMES = {"bitcast", "get-tuple-element", "tuple"}


def _compiled(config, mesh) -> hlo.Module:
    """A dense block and its gradients, for the devices of a TPU."""
    sequences = 2 * mesh.devices.size

    def described(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def make():
        return Block(config, 0, KINDS["dense"], mesh, rngs=nnx.Rngs(0))

    def placed(variable):
        axes = variable.get_metadata()["logical_axes"]
        return variable.replace(described(variable.shape, variable.dtype, parameter_spec(axes)))

    graph, state = nnx.split(nnx.eval_shape(make))
    state = jax.tree.map(placed, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    batch = PartitionSpec(BATCH_AXES)
    places = described((sequences, L), jnp.int32, batch)
    x = described((sequences, L, config.model.embed_dim), jnp.bfloat16, batch)

    def both_ways(state, x, places, gradient):
        angles = rotary_angles(places, config.model)
        inputs, nothing = Inputs(places, places, places), LayerVectors({}, {}, {}, ())

        def run(state, x):
            return nnx.merge(graph, state)(x, nothing, inputs, angles)[0]

        y, pull = jax.vjp(run, state, x)
        return y, pull(gradient)

    options = {"exec_time_optimization_effort": -1.0}
    lowered = jax.jit(both_ways).lower(state, x, places, x)
    return hlo.parse(lowered.compile(compiler_options=options).as_text())


def _between(module: hlo.Module) -> collections.Counter:
    """What makes something of the size of heads on a way between a matmul and attention.

    By opcode, kernels by name; each place once.
    """
    users = collections.defaultdict(list)
    for instruction in module.instructions.values():
        for operand in instruction.operands:
            users[operand].append(instruction.name)
    attention = [i for i, _ in module.scheduled() if i.name.startswith("splash")]
    ends = {i.name for i in attention}
    heads = [
        module.instructions[name]
        for i in attention
        for name in (*i.operands, *users[i.name])
        for array in module.instructions[name].arrays
        if sorted(array.shape[-2:]) == [Dh, L]
    ]
    least = min(math.prod(array.shape) for i in heads for array in i.arrays)
    found, seen = collections.Counter(), set()

    def follow(instruction: hlo.Instruction, back: bool) -> None:
        multiplies = any(i.opcode in ("convolution", "dot") for i in module.fused(instruction))
        small = all(math.prod(array.shape) < least for array in instruction.arrays)
        if instruction.name in ends or multiplies or small:
            return
        if instruction.opcode not in NAMES and instruction.name not in seen:
            kernel = instruction.opcode == "custom-call"
            found[instruction.name.split(".")[0] if kernel else instruction.opcode] += 1
        seen.add(instruction.name)
        for name in instruction.operands if back else users[instruction.name]:
            follow(module.instructions[name], back)

    for instruction in heads:
        made_by_attention = any(name in ends for name in instruction.operands)
        follow(instruction, back=not made_by_attention)
    return found


@pytest.mark.parametrize(
    ("topology", "axes"),
    [("v5e:1x1", {}), pytest.param("v5e:2x2", {"fsdp": 2, "tensor": 2}, marks=pytest.mark.long)],
)
def test_heads_are_moved_by_kernels_alone(topology, axes, tiny_config):
    keys = {f"model.{name}": value for name, value in SIZES.items()}
    keys |= {f"mesh.{axis}": size for axis, size in axes.items()}
    config = tiny_config(**keys, **{"train.seq_len": L})
    mesh = make_mesh(config.mesh, Topology.parse(topology).devices())
    # Queries and keys are rotated on the way in, their gradients on the way out. The gradients of
    # the output and of the values are turned; those themselves lie as they are read.
    kernels = {"rotated_heads": 4, "turned_gradient": 1, "turned_heads": 1}
    assert _between(_compiled(config, mesh)) == kernels
