"""Which kind each layer is, and how kinds repeat, so that a compiler sees a group of them once.

Compilation of unrolled layers grows with their number. A model repeats itself: with STEM layers 1,
4, 7, ... of 16 the kinds are a first `d` and `s d d` five times, so a scan over the five groups
leaves four layers to compile, not sixteen. Parameters of equal places in the groups are stacked.

A scan waits for all rows that its layers read, and gives their gradients all at once: what travels
between devices meanwhile is covered by the layers before it alone. So of ways that leave as many
layers, the groups that begin last are taken: not `d s d` five times and a last `d`.

A training state holds them so: a step that stacked them, and took their gradients apart, would copy
all weights each time. Elsewhere parameters go by layer. A stack is called as Python slices layers:
`blocks.1:16:3.ffn.gate_proj.kernel` holds that of layers 1, 4, 7, 10 and 13.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from stem_jax.config import ModelConfig, layer_fields

# The logical axis that a stack has before those of a layer.
LAYERS = "layers"
_OF_LAYER = re.compile(r"blocks\.(\d+)\.(.+)")
_STACK = re.compile(r"blocks\.(\d+):(\d+):(\d+)\.(.+)")


# Of layers that no key lists.
_UNLISTED = "dense"


def layer_kinds(config: ModelConfig) -> tuple[str, ...]:
    """The name of each layer's kind."""
    kinds = {layer: kind for kind, layers in config.listed_layers.items() for layer in layers}
    return tuple(kinds.get(layer, _UNLISTED) for layer in range(config.num_layers))


def with_layers(config: ModelConfig, kinds: Sequence[str]) -> ModelConfig:
    """The model with as many layers as there are names, of these kinds."""
    listed: dict[str, Any] = {
        field: tuple(layer for layer, name in enumerate(kinds) if name == kind)
        for kind, field in layer_fields().items()
    }
    return dataclasses.replace(config, num_layers=len(kinds), **listed)


@dataclasses.dataclass(frozen=True)
class LayerGroups:
    """`repeats` groups of `period` layers from layer `first` on; the others stand alone."""

    first: int
    period: int
    repeats: int

    @property
    def end(self) -> int:
        """The first layer after the groups."""
        return self.first + self.period * self.repeats

    @property
    def places(self) -> range:
        """The layers of the first group."""
        return range(self.first, self.first + self.period)

    def layers(self, place: int) -> range:
        """Those that stand where layer `place` stands in the first group."""
        return range(place, self.end, self.period)

    def stack(self, place: int) -> str:
        """What these layers are called together."""
        return f"blocks.{place}:{self.end}:{self.period}"


def repeating_groups(forms: Sequence[Hashable]) -> LayerGroups | None:
    """The groups that leave the fewest layers to compile, and of these those that begin last; None
    if no layer can be saved.

    Args:
        forms: of each layer; layers of one form are the same program.
    """
    found = [
        LayerGroups(first, period, repeats)
        for period in range(1, len(forms) // 2 + 1)
        for first in range(len(forms) - 2 * period + 1)
        if (repeats := _repeats(forms, first, period)) > 1
    ]
    return max(found, key=lambda g: (g.period * (g.repeats - 1), g.first), default=None)


def _repeats(forms: Sequence[Hashable], first: int, period: int) -> int:
    end = first + period
    while end + period <= len(forms) and forms[end : end + period] == forms[first : first + period]:
        end += period
    return (end - first) // period


def stack_names(names: Iterable[str], groups: LayerGroups | None) -> list[str]:
    """What a state calls the parameters that have these names by layer."""
    return list(dict.fromkeys(_stack_name(name, groups) for name in names))


def _stack_name(name: str, groups: LayerGroups | None) -> str:
    found = _OF_LAYER.fullmatch(name)
    if groups is None or found is None or not groups.first <= int(found[1]) < groups.end:
        return name
    place = groups.first + (int(found[1]) - groups.first) % groups.period
    return f"{groups.stack(place)}.{found[2]}"


def layer_names(name: str) -> list[str]:
    """The names by layer of what a state calls so; of all but stacks the name itself."""
    found = _STACK.fullmatch(name)
    if found is None:
        return [name]
    return [f"blocks.{layer}.{found[4]}" for layer in range(*map(int, found.groups()[:3]))]


def stacked(tree: Any, names: Iterable[str], stack: Callable = jnp.stack) -> Any:
    """A tree that has its parameters by layer, as a state has it that calls them so.

    Args:
        tree: a dictionary in it has a parameter of all layers or of none. In place of one may stand
            a tree with that of each layer in the same places (optimizers mask what they leave
            alone).
        names: of the state.
        stack: makes one of the list of some layers'.
    """
    layers_of = {name: layer_names(name) for name in names}
    every = {layer for layers in layers_of.values() for layer in layers}

    def stacks(part: dict) -> dict:
        if every.isdisjoint(part):
            return {key: _map_dicts(stacks, value) for key, value in part.items()}
        return {
            name: jax.tree.map(lambda *each: stack(list(each)), *(part[layer] for layer in layers))
            if len(layers) > 1
            else part[layers[0]]
            for name, layers in layers_of.items()
            if layers[0] in part
        }

    return _map_dicts(stacks, tree)


def _taken(stack: jax.Array, index: int) -> jax.Array:
    return jax.lax.index_in_dim(stack, index, keepdims=False)


def by_layer(tree: Any, take: Callable = _taken) -> Any:
    """The reverse; what is by layer already stays as it is.

    Args:
        tree: of a state.
        take: makes a layer's of (stack, index).
    """

    def layers(part: dict) -> dict:
        found = {}
        for name, value in part.items():
            names = layer_names(name)
            if len(names) == 1:
                found[name] = _map_dicts(layers, value)
            else:
                found |= {
                    layer: jax.tree.map(lambda stack, index=index: take(stack, index), value)
                    for index, layer in enumerate(names)
                }
        return found

    return _map_dicts(layers, tree)


def _map_dicts(change: Callable[[dict], dict], tree: Any) -> Any:
    """The tree with each of its outermost dictionaries changed."""
    return jax.tree.map(
        lambda part: change(part) if isinstance(part, dict) else part,
        tree,
        is_leaf=lambda part: isinstance(part, dict),
    )


def stack_and_free(layers: list[jax.Array]) -> jax.Array:
    """One array from those of some layers, in their places; they are deleted.

    Of a whole model the devices hold one parameter of these layers twice, and no more.
    """
    whole = jax.block_until_ready(_stacker(_of_stack(layers[0].sharding))(*layers))
    for layer in layers:
        layer.delete()
    return whole


@functools.cache
def _stacker(place: Sharding | None):
    return jax.jit(lambda *layers: jnp.stack(layers), out_shardings=place)


def _of_stack(sharding: Sharding) -> Sharding | None:
    if not isinstance(sharding, NamedSharding):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def of_layer(sharding: Sharding) -> Sharding:
    """Where a layer's array lies of a stack that lies so."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
