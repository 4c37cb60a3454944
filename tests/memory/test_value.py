"""Memories whose key is the token: keys and rows, of which layers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.memory.memory import Memory
from stem_jax.memory.per_layer import PerLayerMemory
from stem_jax.memory.stem import StemMemory
from stem_jax.memory.value import ValueMemory

KINDS = {"stem": StemMemory, "value": ValueMemory, "per_layer": PerLayerMemory}


@pytest.fixture(params=sorted(KINDS))
def memory(request) -> Memory:
    return KINDS[request.param](88, 16, (1, 3, 4))


def test_each_has_a_name_of_its_own():
    assert {name: kind(88, 16, (0,)).name for name, kind in KINDS.items()} == {
        name: name for name in KINDS
    }


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_a_token_is_its_own_key(memory, xp):
    """Whatever came before it, and of whichever document."""
    tokens = xp.arange(12).reshape(2, 6) * 7
    segments = xp.array([[1, 1, 2, 2, 0, 0]] * 2)
    assert memory.reach == 0
    for before in (None, xp.zeros((2, 0), int)):
        np.testing.assert_array_equal(memory.keys(tokens, segments, before), tokens)


def test_a_row_has_a_vector_for_each_layer_that_reads(memory):
    assert (memory.num_keys, memory.vectors, memory.width) == (88, 3, 16)
    found = {layer: memory.reads(layer) for layer in range(6)}
    assert {layer for layer, read in found.items() if read is not None} == {1, 3, 4}
    assert [found[layer][1] for layer in (1, 3, 4)] == [0, 1, 2]
    # Of the one key of a token.
    assert [list(range(1))[found[layer][0]] for layer in (1, 3, 4)] == [[0]] * 3


def test_it_is_a_value(memory):
    """As memories are compared where a run goes on."""
    assert memory == dataclasses.replace(memory) and len({memory, dataclasses.replace(memory)}) == 1
    others = [kind(88, 16, (1, 3, 4)) for kind in KINDS.values()]
    assert others.count(memory) == 1
