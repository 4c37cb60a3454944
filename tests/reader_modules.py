"""Readers of memories by themselves: their parameters by name, in their places on a mesh."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from stem_jax.mesh import parameter_spec, token_spec


@dataclasses.dataclass(frozen=True)
class Reader:
    """params, axes: by name within the reader. bind: makes a reader of such parameters."""

    params: dict[str, jax.Array]
    axes: dict[str, tuple[str, ...]]
    bind: Callable[[dict], nnx.Module]


def taken_apart(module: nnx.Module) -> Reader:
    """What a reader is made of."""
    graph, state = nnx.split(module)
    flat = {".".join(map(str, path)): (path, found) for path, found in nnx.to_flat_state(state)}

    def bind(params):
        assert params.keys() == flat.keys()
        found = [(path, old.replace(params[name])) for name, (path, old) in flat.items()]
        return nnx.merge(graph, nnx.from_flat_state(found))

    return Reader(
        {name: variable[...] for name, (_, variable) in flat.items()},
        {name: variable.get_metadata()["logical_axes"] for name, (_, variable) in flat.items()},
        bind,
    )


def placed_params(reader: Reader, params: dict, mesh) -> dict:
    """Parameters where a run has them."""
    return {
        name: jax.device_put(value, NamedSharding(mesh, parameter_spec(reader.axes[name])))
        for name, value in params.items()
    }


def placed_inputs(x_BxLxD, embedded_BxLxD, rows_BxLx1xF, mesh) -> tuple[jax.Array, ...]:
    """What blocks hand to readers where a run has it: columns of rows over `tensor`."""
    inputs = (x_BxLxD, ()), (embedded_BxLxD, ()), (rows_BxLx1xF, (None, "tensor"))
    return tuple(
        jax.device_put(np.asarray(value), NamedSharding(mesh, token_spec(*others)))
        for value, others in inputs
    )
