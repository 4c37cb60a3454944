"""Engram as transformers' `qwen4_exp` holds it, with one residual stream, and as we do.

    ours, of the reader of a layer            theirs, of the layer's Qwen4ExpTextPLELayer
    key_proj.kernel [K, F, D]                 key_proj.weight [D, K F]
    value_proj.kernel [K, F, D]               value_proj.weight [D, K F]
    key_norm.scale, query_norm.scale [D]      norm_key.weight, norm_query.weight, less 1
    conv_norm.scale [D]                       norm_conv.weight, less 1
    conv.kernel [4, D]                        conv1d.weight [D, 1, 4]
    rows of the layer's keys [keys, F]        ple_embedding.ngram_embedding.weight
    NGramMemory.multipliers                   ple_embedding.layer_multipliers
    NGramMemory.head_sizes                    ple_embedding.ngram_heads_vocab_sizes
    NGramMemory.head_offsets, from 0          ple_embedding.ngram_heads_offsets

A layer's keys are those of `NGramMemory.block`, in their order and with their padding. Norms there
multiply by 1 plus the weight, so a scale may come back with another last bit.
"""

from collections.abc import Mapping

import numpy as np

from stem_jax.errors import InputError
from stem_jax.interop.names import check_shapes
from stem_jax.memory.ngram import NGramMemory
from stem_jax.model.engram import Engram

_PROJECTIONS = {"key_proj.kernel": "key_proj.weight", "value_proj.kernel": "value_proj.weight"}
_NORMS = {
    "key_norm.scale": "norm_key.weight",
    "query_norm.scale": "norm_query.weight",
    "conv_norm.scale": "norm_conv.weight",
}
_CONV = ("conv.kernel", "conv1d.weight")
_MEMORY = "ple_embedding."
_ROWS = "ngram_embedding.weight"


def from_ngram_embedding(
    tensors: Mapping[str, np.ndarray], memory: NGramMemory, layer: int, prefix: str = ""
) -> np.ndarray:
    """Rows [keys, F] of a layer's keys from a state dict of `Qwen4ExpTextNGramEmbedding`.

    Raises:
        InputError: names tensors that are missing or of another shape, and numbers of the hash that
            are not the memory's: its keys would be other rows.
    """
    expected = _hash_numbers(memory, layer)
    shapes = {prefix + name: numbers.shape for name, numbers in expected.items()}
    shapes[prefix + _ROWS] = _rows_shape(memory, layer)
    check_shapes({name: tensors[name] for name in shapes if name in tensors}, shapes)
    for name, numbers in expected.items():
        given = tensors[prefix + name]
        if not np.array_equal(given, numbers):
            raise InputError(
                f"{prefix}{name} is {given.tolist()}, and the n-gram memory of layer {layer} has "
                f"{numbers.tolist()}; give it the vocabulary, orders, heads, keys, seed and place "
                "among the layers of theirs"
            )
    return np.array(tensors[prefix + _ROWS])


def to_ngram_embedding(
    rows_KxF: np.ndarray, memory: NGramMemory, layer: int, prefix: str = ""
) -> dict[str, np.ndarray]:
    """The inverse of `from_ngram_embedding`."""
    check_shapes({_ROWS: rows_KxF}, {_ROWS: _rows_shape(memory, layer)})
    tensors = {**_hash_numbers(memory, layer), _ROWS: np.array(rows_KxF)}
    return {prefix + name: value for name, value in tensors.items()}


def from_ple_layer(
    tensors: Mapping[str, np.ndarray], memory: NGramMemory, layer: int, prefix: str = ""
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A reader's parameters and its rows from a state dict of `Qwen4ExpTextPLELayer`.

    Args:
        prefix: of its names, such as "model.layers.1.ple."; what has another is not read.

    Returns:
        Parameters by their names within the reader, and the rows [keys, F] of the layer's keys.

    Raises:
        InputError: as `from_ngram_embedding`.
    """
    rows_KxF = from_ngram_embedding(tensors, memory, layer, f"{prefix}{_MEMORY}")
    conv = tensors.get(prefix + _CONV[1])
    if conv is None or conv.ndim != 3:
        raise InputError(
            f"{prefix}{_CONV[1]} is {'missing' if conv is None else conv.shape}, expected [D, 1, "
            "taps]; give the state dict of a layer with its convolution"
        )
    embed_dim, _, taps = conv.shape
    ours = _weights(memory, embed_dim, taps)
    expected = {prefix + name: shape for name, shape in _their_shapes(ours).items()}
    check_shapes({name: tensors[name] for name in expected if name in tensors}, expected)
    params = {
        name: tensors[prefix + theirs].T.reshape(ours[name])
        for name, theirs in _PROJECTIONS.items()
    }
    params |= {name: tensors[prefix + theirs] + 1 for name, theirs in _NORMS.items()}
    params[_CONV[0]] = tensors[prefix + _CONV[1]][:, 0].T
    return {name: np.array(params[name], order="C") for name in ours}, rows_KxF


def to_ple_layer(
    params: Mapping[str, np.ndarray],
    rows_KxF: np.ndarray,
    memory: NGramMemory,
    layer: int,
    prefix: str = "",
) -> dict[str, np.ndarray]:
    """The inverse of `from_ple_layer`.

    Raises:
        InputError: names parameters and rows that are missing, unknown or of another shape.
    """
    taps, embed_dim = np.shape(params.get(_CONV[0], np.zeros((4, 0))))
    ours = _weights(memory, embed_dim, taps)
    check_shapes(params, ours)
    tensors = {
        theirs: params[name].reshape(-1, embed_dim).T for name, theirs in _PROJECTIONS.items()
    }
    tensors |= {theirs: params[name] - 1 for name, theirs in _NORMS.items()}
    tensors[_CONV[1]] = params[_CONV[0]].T[:, None]
    found = {prefix + name: np.array(value, order="C") for name, value in tensors.items()}
    return found | to_ngram_embedding(rows_KxF, memory, layer, f"{prefix}{_MEMORY}")


def _weights(memory: NGramMemory, embed_dim: int, taps: int) -> dict[str, tuple[int, ...]]:
    return Engram.weights(
        embed_dim=embed_dim, keys=memory.keys_of_layer, width=memory.width, taps=taps
    )


def _their_shapes(ours: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    keys, width, embed_dim = ours["key_proj.kernel"]
    shape: tuple[int, ...] = (embed_dim, keys * width)
    shapes = dict.fromkeys(_PROJECTIONS.values(), shape)
    shapes |= {theirs: ours[name] for name, theirs in _NORMS.items()}
    return shapes | {_CONV[1]: (embed_dim, 1, ours[_CONV[0]][0])}


def _rows_shape(memory: NGramMemory, layer: int) -> tuple[int, int]:
    block = memory.block(memory.layers.index(layer))
    return block.stop - block.start, memory.width


def _hash_numbers(memory: NGramMemory, layer: int) -> dict[str, np.ndarray]:
    place = memory.layers.index(layer)
    return {
        "layer_multipliers": np.array(memory.multipliers[place]),
        "ngram_heads_vocab_sizes": np.array(memory.head_sizes[place]),
        "ngram_heads_offsets": np.array(memory.head_offsets[place]) - memory.block(place).start,
    }
