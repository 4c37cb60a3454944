"""Parameters and optimizer state of a checkpoint: by layer, however a state stacks them."""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from stem_jax.model.layer_plan import by_layer, of_layer, stack_and_free, stacked

_HOST = "pinned_host"


def saved_params(tree: Any) -> Any:
    """What is saved of a state's tree: layers that it stacks are in host memory.

    They come there one after the other. All at once, the devices would hold their parameters and
    moments twice.
    """
    return by_layer(tree, _on_host)


def param_targets(tree: Any) -> Any:
    """What a state's abstract tree is restored from."""
    return by_layer(tree, _abstract_layer)


def restored_params(tree: Any, names: Iterable[str]) -> Any:
    """The tree of a state that calls its parameters so; those that it stacks are deleted."""
    return stacked(tree, names, stack_and_free)


def plain(opt_state: Any) -> dict[str, Any]:
    """The optimizer state as a flat dictionary: named tuples differ between optax versions."""
    return {f"{index:03d}": leaf for index, leaf in enumerate(jax.tree.leaves(opt_state))}


def unplain(flat: dict[str, Any], like: Any) -> Any:
    """The optimizer state with the structure of another."""
    return jax.tree.unflatten(jax.tree.structure(like), [flat[key] for key in sorted(flat)])


def _abstract_layer(stack: jax.ShapeDtypeStruct, index: int) -> jax.ShapeDtypeStruct:
    del index
    place = None if stack.sharding is None else of_layer(stack.sharding)
    return jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=place)


def _on_host(stack: jax.Array, index: int) -> jax.Array:
    """A layer's array in host memory, where devices have one that they reach; returns when it is.

    Of what several devices hold each brings a part.
    """
    layer = _taker(_spread(of_layer(stack.sharding), stack.shape[1:]))(stack, index)
    shards = layer.addressable_shards
    if not all(_HOST in {m.kind for m in s.device.addressable_memories()} for s in shards):
        return layer
    arrays = [
        jax.device_put(shard.data, SingleDeviceSharding(shard.device, memory_kind=_HOST))
        for shard in shards
    ]
    place = layer.sharding.with_memory_kind(_HOST)
    jax.block_until_ready(arrays)
    return jax.make_array_from_single_device_arrays(layer.shape, place, arrays)


@functools.cache
def _taker(place: Sharding):
    def take(stack: jax.Array, index: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)

    return jax.jit(take, out_shardings=place)


def _spread(sharding: Sharding, shape: tuple[int, ...]) -> Sharding:
    """The same over all axes of the mesh, where they divide a dimension."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    mesh = sharding.mesh
    axes = [() if a is None else (a,) if isinstance(a, str) else tuple(a) for a in sharding.spec]
    free = [name for name in mesh.axis_names if name not in sum(axes, ())]
    for dimension, size in enumerate(shape):
        over = (*axes[dimension], *free)
        if size % math.prod(mesh.shape[name] for name in over) == 0:
            axes[dimension] = over
            return NamedSharding(mesh, PartitionSpec(*axes))
    return sharding
