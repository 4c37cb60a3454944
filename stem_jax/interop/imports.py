"""What the three formats that can be imported hold, under our names."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stem_jax.config import ModelConfig
from stem_jax.data.tokenizer import Tokenizer, load_tokenizer, load_tokenizer_folder
from stem_jax.errors import InputError
from stem_jax.interop.import_model import Imported
from stem_jax.interop.llama_names import (
    EMBEDDING,
    HEAD,
    llama_shapes,
    llama_weights,
    table_names,
)
from stem_jax.interop.names import (
    STEM_PREFIX,
    check_official,
    check_shapes,
    official_pairs,
    official_table_names,
)
from stem_jax.interop.official_format import (
    official_model_values,
    official_tokenizer,
    read_official,
)
from stem_jax.interop.safetensors_files import read_folder
from stem_jax.interop.tokenizer_export import NATIVE_FOLDER

FORMATS = ("official", "hf", "llama")
# Values of a Llama configuration that change what is computed, with those that we compute.
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
}
_SIZES = (
    "vocab_size",
    "embed_dim",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_dim",
)
_ROPE_ONLY = {
    "default": {},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": None,
        "mscale": None,
        "mscale_all_dim": None,
        "truncate": True,
    },
}


class LazyParams(Mapping):
    """Our parameters by name, each made when it is asked for."""

    def __init__(self, makers: dict[str, Callable[[], np.ndarray]]):
        self._makers = makers

    def __getitem__(self, name: str) -> np.ndarray:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def read_model(kind: str, path: str | Path) -> Imported:
    """Reads a folder.

    Args:
        kind: "official", "hf" (one of our exports for transformers) or "llama" (any Llama there).
        path: the folder.

    Raises:
        InputError: missing or damaged files, tensors that do not fit the configuration beside them,
            or a model that computes what ours does not.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"--path={path} is not a folder; give the folder of a model")
    return _official(path) if kind == "official" else _transformers(kind, path)


def find_tokenizer(kind: str, path: Path, given: tuple[str, str | None] | None) -> Tokenizer:
    """The tokenizer of a model.

    Args:
        kind: format of the model.
        path: its folder.
        given: kind and file, which come first; None to look for them in the folder.

    Raises:
        InputError: there is none, it cannot be read, or another one was exported with the model.
    """
    native = path / NATIVE_FOLDER
    if given is not None:
        tokenizer = load_tokenizer(*given)
        if kind != "official" and native.is_dir():
            own = load_tokenizer_folder(native)
            if tokenizer.fingerprint != own.fingerprint:
                raise InputError(
                    f"--tokenizer={tokenizer.kind} has fingerprint {tokenizer.fingerprint[:12]}, "
                    f"the model was exported with {own.fingerprint[:12]}, which is in {native}; "
                    "leave the flag out"
                )
        return tokenizer
    if kind == "official":
        found = official_tokenizer(json.loads(_params_file(path).read_text()), path)
        if found is not None:
            return load_tokenizer(*found)
    elif native.is_dir():
        return load_tokenizer_folder(native)
    elif (path / "tokenizer.json").is_file():
        return load_tokenizer("hf", path / "tokenizer.json")
    elif (path / "tokenizer.model").is_file():
        return load_tokenizer("sentencepiece", path / "tokenizer.model")
    raise InputError(
        f"--path={path} has no tokenizer; give the one that the model was trained with by "
        "--tokenizer-path=FILE (and --tokenizer=sentencepiece or hf), or --tokenizer=bytes"
    )


def llama_model_values(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """The values of our model section from a config.json.

    Raises:
        InputError: a key is missing, or asks for what we do not compute.
    """
    for key, value in _ONLY.items():
        if config.get(key) not in (None, value):
            raise InputError(
                f"config.json has {key}={config[key]!r}, only {value!r} can be imported"
            )
    try:
        D, H = config["hidden_size"], config["num_attention_heads"]
        return {
            "vocab_size": config["vocab_size"],
            "embed_dim": D,
            "num_layers": config["num_hidden_layers"],
            "num_heads": H,
            "num_kv_heads": config.get("num_key_value_heads") or H,
            "head_dim": config.get("head_dim") or D // H,
            "ffn_dim": config["intermediate_size"],
            "stem_layers": tuple(config.get("stem_layers", ())),
            "tie_embeddings": tied,
            "norm_eps": float(config["rms_norm_eps"]),
            **_rope_values(config),
        }
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"config.json: {type(error).__name__} {error}; give the file that belongs to the model"
        ) from error


def _official(path: Path) -> Imported:
    params, tensors = read_official(path)
    values = official_model_values(params, tensors)
    model = _model(values)
    prefix = STEM_PREFIX if any(name.startswith(STEM_PREFIX) for name in tensors) else ""
    check_official(tensors, model, prefix)

    def maker(pair):
        tensor = tensors[prefix + pair.official]
        return lambda: tensor.T if pair.is_linear else tensor

    makers = {pair.ours: maker(pair) for pair in official_pairs(model)}
    context = params["model"].get("max_seqlen") or 1024
    tables = [tensors[name] for name in official_table_names(model)]
    return Imported(values, context, LazyParams(makers), tables)


def _transformers(kind: str, path: Path) -> Imported:
    try:
        config = json.loads((path / "config.json").read_text())
        found = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--path={path} has no readable config.json; give the folder of a model of transformers"
        ) from error
    if found not in {"hf": ("stem", "llama"), "llama": ("llama",)}[kind]:
        raise InputError(
            f"--path={path} holds a model of type {found!r}; --from={kind} reads "
            + {"hf": "exports of stem_jax and Llama models", "llama": "Llama models"}[kind]
        )
    tensors = read_folder(path)
    # Older files carry the rotary frequencies along.
    tensors = {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    # A tied head is mostly left out, but may be there.
    tied = bool(config.get("tie_word_embeddings", False))
    values = llama_model_values(config, tied)
    model = _model(values)
    if tied and HEAD in tensors and EMBEDDING in tensors:
        if not np.array_equal(tensors[HEAD], tensors[EMBEDDING]):
            raise InputError(
                f"{HEAD} differs from {EMBEDDING}, but config.json has tie_word_embeddings=true; "
                "set it to false"
            )
        del tensors[HEAD]
    check_shapes(tensors, llama_shapes(model))

    def maker(weight):
        return lambda: weight.to_ours(tensors[weight.theirs])

    makers = {weight.ours: maker(weight) for weight in llama_weights(model)}
    tables = [tensors[name] for name in table_names(model)]
    context = config.get("max_position_embeddings", 2048)
    return Imported(values, context, LazyParams(makers), tables, _special_ids(config))


def _special_ids(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    ids = {}
    for name in ("bos_token_id", "eos_token_id"):
        value = config.get(name)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(one) is int for one in found):
            raise InputError(f"config.json has {name}={value!r}, expected token ids; correct it")
        ids[name] = tuple(found)
    return ids


def _rope_values(config: Mapping[str, Any]) -> dict[str, Any]:
    # Before transformers 5 the base stood by itself, and the rest under rope_scaling.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(
            f"config.json has {rope!r} as its rotary parameters, expected a dictionary; correct it"
        )
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _ROPE_ONLY:
        raise InputError(
            f"config.json has the rotary scaling {kind!r}, only {', '.join(_ROPE_ONLY)} can be "
            "imported"
        )
    for key, value in _ROPE_ONLY[kind].items():
        if rope.get(key) not in (None, value):
            raise InputError(
                f"config.json has {key}={rope[key]} in its rotary scaling, only {value} can be "
                "imported"
            )
    if kind == "default":
        return {
            "rope_theta": theta,
            "rope_scaling": "none",
            "rope_factor": 1.0,
            "rope_original_len": None,
        }
    return {
        "rope_theta": theta,
        "rope_scaling": kind,
        "rope_factor": float(rope["factor"]),
        "rope_original_len": int(rope["original_max_position_embeddings"]),
    }


def _model(values: dict[str, Any]) -> ModelConfig:
    """A model of these sizes; the other values do not matter for its tensors.

    Raises:
        InputError: a size that is none.
    """
    for name in _SIZES:
        if type(values[name]) is not int or values[name] < 1:
            raise InputError(
                f"the configuration beside the tensors gives {name}={values[name]!r}, expected a "
                "number of at least 1; give the file that belongs to the model"
            )
    others = dict.fromkeys(ModelConfig.__dataclass_fields__)
    return ModelConfig(**{**others, **values})


def _params_file(path: Path) -> Path:
    inner = path / "consolidated" / "params.json"
    return inner if inner.is_file() else path / "params.json"
