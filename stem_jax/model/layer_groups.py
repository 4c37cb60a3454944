"""Layers as a repeating group, so that a compiler sees the group once.

Compilation of unrolled layers grows with their number. A model repeats itself: with STEM layers 1,
4, 7, ... of 16 the kinds are `d s d` five times and a last `d`, so a scan over the five groups
leaves four layers to compile, not sixteen. Parameters keep their names; the scan stacks those of
equal places in the groups.
"""

import dataclasses

import jax
import jax.numpy as jnp

from stem_jax.config import ModelConfig


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


def repeating_groups(config: ModelConfig) -> LayerGroups | None:
    """The groups that leave the fewest layers to compile; None if no layer can be saved."""
    stem = [layer in config.stem_layers for layer in range(config.num_layers)]
    found = [
        LayerGroups(first, period, repeats)
        for period in range(1, len(stem) // 2 + 1)
        for first in range(len(stem) - 2 * period + 1)
        if (repeats := _repeats(stem, first, period)) > 1
    ]
    return min(found, key=lambda g: len(stem) - g.period * (g.repeats - 1), default=None)


def _repeats(stem: list[bool], first: int, period: int) -> int:
    end = first + period
    while end + period <= len(stem) and stem[end : end + period] == stem[first : first + period]:
        end += period
    return (end - first) // period


def stacked(states: list) -> object:
    """One pytree with a new leading dimension from many of the same structure."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
