"""State dicts of transformers' n-gram modules as ours, and back."""

import numpy as np
import pytest
import torch

from stem_jax.errors import InputError
from stem_jax.interop.engram_names import (
    from_ngram_embedding,
    from_ple_layer,
    to_ngram_embedding,
    to_ple_layer,
)
from stem_jax.model.engram import Engram
from tests.qwen4_exp import memory, ngram_embedding, ple_layer

D = 24
OURS = memory(max_order=4, pad_multiple=32)


@pytest.fixture(params=[0, 1])
def module(request):
    """Their layer at a place of the list."""
    return ple_layer(OURS, request.param, D)


def _tensors(module) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in module.state_dict().items()}


def test_a_layer_goes_there_and_back(module):
    place = module.ple_embedding.ple_layer_index
    tensors, layer = _tensors(module), OURS.layers[place]
    params, rows = from_ple_layer(tensors, OURS, layer)
    shapes = Engram.weights(embed_dim=D, keys=6, width=6)
    assert {name: value.shape for name, value in params.items()} == shapes
    # The rows that its tokens read are the layer's own part of our table.
    block = OURS.block(place)
    assert len(rows) == block.stop - block.start and rows.shape[1] == OURS.width
    back = to_ple_layer(params, rows, OURS, layer)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype and back[name].shape == value.shape, name
        # 1 is added to norms and taken off.
        np.testing.assert_allclose(back[name], value, rtol=0, atol=1.2e-7 * ("norm_" in name))
    other = ple_layer(OURS, place, D, seed=1)
    other.load_state_dict({name: torch.from_numpy(value) for name, value in back.items()})
    tokens, x = torch.arange(20)[None], torch.ones(1, 20, D)
    with torch.no_grad():
        torch.testing.assert_close(other(x, tokens, None), module(x, tokens, None))


def test_names_may_have_a_prefix_and_neighbours(module):
    prefix = "model.layers.1.ple."
    layer = OURS.layers[module.ple_embedding.ple_layer_index]
    plain = _tensors(module)
    given = {prefix + name: value for name, value in plain.items()}
    params, rows = from_ple_layer(
        {**given, "lm_head.weight": np.zeros((3, 3))}, OURS, layer, prefix
    )
    assert to_ple_layer(params, rows, OURS, layer, prefix).keys() == given.keys()
    np.testing.assert_array_equal(rows, plain["ple_embedding.ngram_embedding.weight"])


def test_an_embedding_alone_goes_there_and_back():
    tensors = _tensors(ngram_embedding(OURS, 1))
    back = to_ngram_embedding(from_ngram_embedding(tensors, OURS, 4), OURS, 4)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value)


def _without(name):
    return lambda tensors: tensors.pop(name)


def _changed(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("key_proj.weight"), "key_proj.weight is missing"),
        (_without("conv1d.weight"), "conv1d.weight is missing"),
        (_without("ple_embedding.layer_multipliers"), "layer_multipliers is missing"),
        (_changed("norm_key.weight", lambda w: w[:-1]), r"norm_key.weight is \(23,\), expected"),
        (
            # Four streams.
            _changed("conv1d.weight", lambda w: np.concatenate([w] * 4)),
            r"value_proj.weight is \(24, 36\), expected \(96, 36\)",
        ),
        (
            _changed("ple_embedding.ngram_embedding.weight", lambda w: w[:-32]),
            r"ngram_embedding.weight is \(\d+, 6\), expected \(\d+, 6\)",
        ),
        (
            _changed("ple_embedding.layer_multipliers", lambda m: m + 2),
            r"layer_multipliers is \[.*\], and the n-gram memory of layer 1 has \[.*seed",
        ),
        (
            _changed("ple_embedding.ngram_heads_vocab_sizes", lambda m: m[::-1]),
            "ngram_heads_vocab_sizes is .*, and the n-gram memory of layer 1 has",
        ),
    ],
)
def test_tensors_that_cannot_be_ours_are_named(change, message):
    tensors = _tensors(ple_layer(OURS, 0, D))
    change(tensors)
    with pytest.raises(InputError, match=message):
        from_ple_layer(tensors, OURS, OURS.layers[0])


def test_parameters_that_cannot_be_theirs_are_named():
    params, rows = from_ple_layer(_tensors(ple_layer(OURS, 0, D)), OURS, OURS.layers[0])
    with pytest.raises(InputError, match=r"ngram_embedding\.weight is .* expected"):
        to_ple_layer(params, rows[1:], OURS, OURS.layers[0])
    with pytest.raises(InputError, match=r"conv_norm\.scale is missing"):
        to_ple_layer({k: v for k, v in params.items() if k != "conv_norm.scale"}, rows, OURS, 1)
