"""Per-layer embeddings as Gemma 4's modules in transformers hold them, and as ours do.

    ours, of the reader of layer i            theirs, linear weights [out, in], N layers
    gate_proj.kernel [D, P]                   layers.i.per_layer_input_gate.weight
    out_proj.kernel [P, D]                    layers.i.per_layer_projection.weight
    out_norm.scale [D]                        layers.i.post_per_layer_input_norm.weight
    embed_proj.kernel [D, P]                  per_layer_model_projection.weight [N P, D], the i-th P
    embed_norm.scale [P]                      per_layer_projection_norm.weight, one for all layers
    rows [V, N, P] by token id                embed_tokens_per_layer.weight [V, N P]
    none: 1                                   layers.i.layer_scalar [1]

Norms multiply by the weight itself. Their embedding of a token, the row of `embed_tokens` times
sqrt(D), is divided by sqrt(D) behind the projection: our `embed_proj` reads the row as it is.
"""

from collections.abc import Mapping

import numpy as np

from stem_jax.errors import InputError
from stem_jax.interop.names import check_shapes
from stem_jax.model.per_layer_reader import PerLayerReader

# By name within our reader, that within their layer and whether it is transposed there.
_OF_LAYER = {
    "gate_proj.kernel": ("per_layer_input_gate.weight", True),
    "out_proj.kernel": ("per_layer_projection.weight", True),
    "out_norm.scale": ("post_per_layer_input_norm.weight", False),
}
_PROJECTION = "per_layer_model_projection.weight"
_NORM = "per_layer_projection_norm.weight"
_ROWS = "embed_tokens_per_layer.weight"
_SCALAR = "layer_scalar"


def gemma_shapes(
    *, vocab_size: int, num_layers: int, embed_dim: int, width: int, prefix: str = ""
) -> dict[str, tuple[int, ...]]:
    """Every tensor of theirs that per-layer embeddings have, with its shape."""
    own = PerLayerReader.weights(embed_dim=embed_dim, width=width)
    shapes: dict[str, tuple[int, ...]] = {
        _PROJECTION: (num_layers * width, embed_dim),
        _NORM: (width,),
        _ROWS: (vocab_size, num_layers * width),
    }
    for layer in range(num_layers):
        for ours, (theirs, turned) in _OF_LAYER.items():
            shapes[f"layers.{layer}.{theirs}"] = own[ours][::-1] if turned else own[ours]
        shapes[f"layers.{layer}.{_SCALAR}"] = (1,)
    return {prefix + name: shape for name, shape in shapes.items()}


def from_gemma(
    tensors: Mapping[str, np.ndarray], *, num_layers: int, prefix: str = ""
) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    """Parameters and rows from a state dict of `Gemma4TextModel`; what else it has is not read.

    Args:
        prefix: of its names, such as "model." in those of `Gemma4ForCausalLM`.

    Returns:
        Of each layer, the parameters of its reader by their names there; and the rows [V, N, P] by
        token id.

    Raises:
        InputError: names tensors that are missing or of another shape, and a `layer_scalar` that is
            not 1, which our layers have not.
    """
    for name in (_NORM, _PROJECTION, _ROWS):
        if prefix + name not in tensors:
            raise InputError(f"{prefix}{name} is missing; give the state dict of a Gemma 4 model")
    width, embed_dim = tensors[prefix + _NORM].shape[0], tensors[prefix + _PROJECTION].shape[-1]
    expected = gemma_shapes(
        vocab_size=len(tensors[prefix + _ROWS]),
        num_layers=num_layers,
        embed_dim=embed_dim,
        width=width,
        prefix=prefix,
    )
    check_shapes({name: tensors[name] for name in expected if name in tensors}, expected)
    layers = []
    for layer in range(num_layers):
        place = f"{prefix}layers.{layer}."
        scalar = float(tensors[place + _SCALAR][0])
        if scalar != 1:
            raise InputError(
                f"{place}{_SCALAR}={scalar} is not 1, and layers here are multiplied by nothing; "
                "take a model that has 1 in all layers"
            )
        params = {
            ours: _turned(tensors[place + theirs], turned)
            for ours, (theirs, turned) in _OF_LAYER.items()
        }
        own = slice(layer * width, (layer + 1) * width)
        params["embed_proj.kernel"] = _turned(tensors[prefix + _PROJECTION][own], True)
        params["embed_norm.scale"] = np.array(tensors[prefix + _NORM])
        layers.append(params)
    rows_VxNxP = np.array(tensors[prefix + _ROWS]).reshape(-1, num_layers, width)
    return layers, rows_VxNxP


def to_gemma(
    layers: list[dict[str, np.ndarray]], rows_VxNxP: np.ndarray, *, prefix: str = ""
) -> dict[str, np.ndarray]:
    """The inverse of `from_gemma`.

    Raises:
        InputError: names parameters that are missing, unknown or of another shape, and layers whose
            `embed_norm` differs from the first one's: there it is one for all.
    """
    vocab_size, num_layers, width = rows_VxNxP.shape
    if len(layers) != num_layers:
        raise InputError(
            f"there are rows of {num_layers} layers and {len(layers)} readers; give those of all "
            "layers, as Gemma 4 has them"
        )
    embed_dim = len(layers[0]["gate_proj.kernel"])
    expected = PerLayerReader.weights(embed_dim=embed_dim, width=width)
    tensors = {
        _PROJECTION: np.concatenate([params["embed_proj.kernel"].T for params in layers]),
        _NORM: layers[0]["embed_norm.scale"],
        _ROWS: rows_VxNxP.reshape(vocab_size, -1),
    }
    for layer, params in enumerate(layers):
        check_shapes(params, expected)
        if not np.array_equal(params["embed_norm.scale"], tensors[_NORM]):
            raise InputError(
                f"embed_norm.scale of layer {layer} differs from that of layer 0, and Gemma 4 has "
                "one for all layers; train them together, or keep the model in its own format"
            )
        for ours, (theirs, turned) in _OF_LAYER.items():
            tensors[f"layers.{layer}.{theirs}"] = _turned(params[ours], turned)
        tensors[f"layers.{layer}.{_SCALAR}"] = np.ones(1, rows_VxNxP.dtype)
    return {prefix + name: value for name, value in tensors.items()}


def _turned(value: np.ndarray, turned: bool) -> np.ndarray:
    return np.ascontiguousarray(value.T if turned else value)
