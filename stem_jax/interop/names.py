"""The one map between our parameter names and those of the official PyTorch code.

    ours, kernels [in, out] but down_proj    official, linear weights [out, in]
    embed.weight                             tok_embeddings.weight
    blocks.0.attention.q_proj.kernel         layers.0.attention.wq.weight
    blocks.0.ffn.gate_proj.kernel            layers.0.feed_forward.w1.weight
    blocks.0.ffn.up_proj.kernel              layers.0.feed_forward.w3.weight (dense layers only)
    blocks.0.ffn.down_proj.kernel            layers.0.feed_forward.w2.weight
    blocks.0.ffn_norm.scale                  layers.0.ffn_norm.weight
    norm.scale                               norm.weight
    head.kernel                              output.weight
    none: the head is the embedding          output.tied_module.weight

In the checkpoints of STEM models all of these start with `lm_transformer.`, in those of dense
models with nothing. `stem_embeddings.i.weight` [V, F] is the table of the i-th STEM layer, not of
layer i.

Rotary positions turn the pairs (i, i + head_dim / 2) of a head here and the adjacent ones, (2i,
2i + 1), there, so the outputs of q_proj and k_proj change their order within each head.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from stem_jax.config import ModelConfig
from stem_jax.errors import InputError
from stem_jax.model.feed_forward import kinds_of
from stem_jax.model.rotary import halves_first, pairs_first
from stem_jax.tables.layout import TableLayout

STEM_PREFIX = "lm_transformer."
TIED_HEAD = "output.tied_module.weight"
_LISTED = 8
# Of two tensors that are compared at a time.
_PIECE_BYTES = 2**25


class Pair(NamedTuple):
    """One parameter: both names, and its shape here (transposed there if `is_linear`).

    heads: how many heads its columns here have, if they are rotated.
    """

    ours: str
    official: str
    shape: tuple[int, ...]
    is_linear: bool
    heads: int = 0

    @property
    def official_shape(self) -> tuple[int, ...]:
        """Its shape there."""
        return self.shape[::-1] if self.is_linear else self.shape

    def to_official(self, value: np.ndarray) -> np.ndarray:
        """Our value as it lies there."""
        value = pairs_first(value, self.heads) if self.heads else value
        return value.T if self.is_linear else value

    def to_ours(self, value: np.ndarray) -> np.ndarray:
        """Their value as it lies here."""
        value = value.T if self.is_linear else value
        return halves_first(value, self.heads) if self.heads else value


def official_to_params(
    tensors: Mapping[str, np.ndarray], config: ModelConfig
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Translates an official state dict, with or without the prefix of STEM models.

    Returns:
        Our parameters by name, and the table [V, S, F] by token id (None without STEM layers).

    Raises:
        InputError: names the tensors that are missing, unknown or of another shape than the
            configuration gives them, or a tied head that differs from the embedding.
    """
    prefix = STEM_PREFIX if any(name.startswith(STEM_PREFIX) for name in tensors) else ""
    check_official(tensors, config, prefix)
    params = {
        pair.ours: np.ascontiguousarray(pair.to_ours(tensors[prefix + pair.official]))
        for pair in official_pairs(config)
    }
    layers = [tensors[name] for name in official_table_names(config)]
    return params, np.stack(layers, axis=1) if layers else None


def check_official(tensors: Mapping[str, np.ndarray], config: ModelConfig, prefix: str) -> None:
    """Raises InputError as `official_to_params` does."""
    check_shapes(tensors, official_shapes(config, prefix))
    embedding = f"{prefix}tok_embeddings.weight"
    if config.tie_embeddings and not same_values(tensors[embedding], tensors[prefix + TIED_HEAD]):
        raise InputError(
            f"{prefix}{TIED_HEAD} differs from {embedding}; set model.tie_embeddings=False and "
            "rename it output.weight"
        )


def params_to_official(
    params: Mapping[str, np.ndarray],
    table_VxSxF: np.ndarray | None,
    config: ModelConfig,
    prefix: str,
) -> dict[str, np.ndarray]:
    """The inverse of `official_to_params`.

    Args:
        params: our parameters by name.
        table_VxSxF: rows by token id; None without STEM layers.
        config: their sizes.
        prefix: `STEM_PREFIX`, or "" as in the checkpoints of dense models.

    Raises:
        InputError: names the parameters that are missing, unknown or of another shape.
    """
    given = dict(params) if table_VxSxF is None else {**params, "table": table_VxSxF}
    expected = {pair.ours: pair.shape for pair in official_pairs(config)}
    if config.num_stem_layers:
        expected["table"] = (config.vocab_size, config.num_stem_layers, config.ffn_dim)
    check_shapes(given, expected)
    tensors = {
        prefix + pair.official: np.ascontiguousarray(pair.to_official(params[pair.ours]))
        for pair in official_pairs(config)
    }
    if config.tie_embeddings:
        tensors[prefix + TIED_HEAD] = params["embed.weight"]
    for index, name in enumerate(official_table_names(config)):
        assert table_VxSxF is not None
        tensors[name] = np.ascontiguousarray(table_VxSxF[:, index])
    return tensors


def official_shapes(config: ModelConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of an official state dict, with its shape."""
    shapes = {prefix + pair.official: pair.official_shape for pair in official_pairs(config)}
    if config.tie_embeddings:
        shapes[prefix + TIED_HEAD] = (config.vocab_size, config.embed_dim)
    return shapes | dict.fromkeys(official_table_names(config), (config.vocab_size, config.ffn_dim))


def official_table_names(config: ModelConfig) -> list[str]:
    """The tables, in the order of the STEM layers."""
    return [f"stem_embeddings.{index}.weight" for index in range(config.num_stem_layers)]


def table_to_rows(table_VxSxF: np.ndarray, layout: TableLayout) -> np.ndarray:
    """A table by token id as rows [V_pad, S, F] in the order of the layout; padding is zero."""
    rows = np.zeros((layout.num_rows, *table_VxSxF.shape[1:]), table_VxSxF.dtype)
    rows[layout.row_numbers(np.arange(layout.num_keys))] = table_VxSxF
    return rows


def rows_to_table(rows_VxSxF: np.ndarray, layout: TableLayout) -> np.ndarray:
    """Rows in the order of the layout as a table [V, S, F] by token id, without the padding."""
    return rows_VxSxF[layout.row_numbers(np.arange(layout.num_keys))]


def official_pairs(config: ModelConfig) -> Iterator[Pair]:
    """Every parameter of the backbone."""
    D, F, V = config.embed_dim, config.ffn_dim, config.vocab_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield Pair("embed.weight", "tok_embeddings.weight", (V, D), False)
    for layer, kind in enumerate(kinds_of(config)):
        linear = [
            Pair("attention.q_proj", "attention.wq", (D, queries), True, config.num_heads),
            Pair("attention.k_proj", "attention.wk", (D, keys), True, config.num_kv_heads),
            Pair("attention.v_proj", "attention.wv", (D, keys), True),
            Pair("attention.o_proj", "attention.wo", (queries, D), True),
            Pair("ffn.gate_proj", "feed_forward.w1", (D, F), True),
            Pair("ffn.down_proj", "feed_forward.w2", (D, F), False),
        ]
        if "up_proj.kernel" in kind.weights(config):
            linear.append(Pair("ffn.up_proj", "feed_forward.w3", (D, F), True))
        for pair in linear:
            ours, official = f"blocks.{layer}.{pair.ours}", f"layers.{layer}.{pair.official}"
            yield pair._replace(ours=f"{ours}.kernel", official=f"{official}.weight")
        for norm in ("attention_norm", "ffn_norm"):
            yield Pair(f"blocks.{layer}.{norm}.scale", f"layers.{layer}.{norm}.weight", (D,), False)
    yield Pair("norm.scale", "norm.weight", (D,), False)
    if not config.tie_embeddings:
        yield Pair("head.kernel", "output.weight", (D, V), True)


def same_values(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two tensors hold the same numbers, NaN being like NaN; read a piece at a time."""
    if one.shape != other.shape:
        return False
    one, other = np.atleast_1d(one), np.atleast_1d(other)
    size = max(1, _PIECE_BYTES // max(1, one[:1].nbytes))
    return all(
        np.array_equal(
            np.asarray(one[first : first + size], np.float32),
            np.asarray(other[first : first + size], np.float32),
            equal_nan=True,
        )
        for first in range(0, len(one), size)
    )


def check_shapes(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises InputError that names the tensors that are missing, unknown or of another shape."""
    given = {name: value.shape for name, value in tensors.items()}
    problems = [f"{name} is missing" for name in expected if name not in given]
    problems += [f"{name} is unknown" for name in given if name not in expected]
    problems += [
        f"{name} is {tuple(given[name])}, expected {shape}"
        for name, shape in expected.items()
        if name in given and tuple(given[name]) != shape
    ]
    if problems:
        more = f", and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise InputError(
            f"the tensors do not fit the model configuration: {', '.join(problems[:_LISTED])}"
            f"{more}; change the model section of the configuration to that of the checkpoint"
        )
