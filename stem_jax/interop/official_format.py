"""The folder format of the official PyTorch code.

    consolidated/consolidated.pth       {"model": backbone and tables}
    consolidated/consolidated_stem.pth  tables alone
    consolidated/params.json            sizes, dtype, tokenizer

The official code reads the tables from the one or the other, depending on the program.
"""

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stem_jax.checkpoints.files import check_outside
from stem_jax.checkpoints.saved_model import SavedModel
from stem_jax.config import Config, ModelConfig
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.errors import InputError
from stem_jax.files import new_folder, read_json
from stem_jax.interop.hf_export import DTYPES
from stem_jax.interop.names import (
    STEM_PREFIX,
    TIED_HEAD,
    official_pairs,
    official_table_names,
    same_values,
)
from stem_jax.interop.safetensors_files import BFLOAT16, SINGLE_FILE, SafetensorsWriter, read_file
from stem_jax.interop.said_keys import check_format
from stem_jax.json_fields import Fields
from stem_jax.storage import Place, is_remote

FOLDER = "consolidated"
_BACKBONE, _TABLES, _PARAMS = "consolidated.pth", "consolidated_stem.pth", "params.json"
_MODEL_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
# The official code's names of our tokenizer kinds; it has none for a tokenizer.json.
_TOKENIZERS = {"sentencepiece": "sp", "bytes": "bytes"}
_REMEDY = "give the file that was written with the checkpoint"


def export_official(
    saved: SavedModel,
    out: str | Path,
    *,
    dtype: str = "float32",
    with_tokenizer: bool = True,
    home: Place | None = None,
) -> None:
    """Writes the `consolidated` folder.

    Tensors lie in a temporary file meanwhile, mapped into memory: that takes as much disk space
    again, but no memory.

    Args:
        home: where the folder will be found, if not at `out`.

    Raises:
        InputError: the folder exists or does not fit onto the disk, torch is missing, or the model
            has what the official code has not: rotary scaling, or a tokenizer.json.
    """
    torch = import_torch()
    out = Path(out)
    home = home if home is not None and is_remote(home) else out.absolute()
    # The path is in params.json, so it is that of the finished folder.
    params = official_params(saved.config, dtype)
    params["data"] = {"tokenizer": _tokenizer_entry(saved.tokenizer, home, with_tokenizer)}
    prefix = STEM_PREFIX if saved.model.stem_layers else ""
    check_outside(out, "--out")
    with new_folder(out, "--out") as folder:
        _check_space(saved.model, folder, DTYPES[dtype], out)
        target = folder / FOLDER
        target.mkdir()
        if with_tokenizer and saved.tokenizer.file_name is not None:
            (target / saved.tokenizer.file_name).write_bytes(saved.tokenizer.source)
        (target / _PARAMS).write_text(json.dumps(params, indent=2) + "\n")
        arrays = _mapped_tensors(saved, folder, prefix, DTYPES[dtype])
        tensors = {name: _to_torch(array, torch) for name, array in arrays.items()}
        if saved.model.tie_embeddings:
            tensors[prefix + TIED_HEAD] = tensors[f"{prefix}tok_embeddings.weight"]
        _save(torch, {"model": tensors}, target / _BACKBONE, out)
        if saved.model.stem_layers:
            names = official_table_names(saved.model)
            _save(torch, {name: tensors[name] for name in names}, target / _TABLES, out)
        (folder / SINGLE_FILE).unlink()


def official_params(config: Config, dtype: str) -> dict[str, Any]:
    """params.json without its tokenizer.

    Raises:
        InputError: the model has what the official code has not, see `said_keys`.
    """
    model = config.model
    check_format(config, "official")
    sizes = {
        "dim": model.embed_dim,
        "n_layers": model.num_layers,
        "head_dim": model.head_dim,
        "n_heads": model.num_heads,
        "n_kv_heads": model.num_kv_heads,
        **_ffn_sizes(model),
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "init_base_std": model.init_base_std,
        "init_std_factor": model.init_std_factor,
        "max_seqlen": config.train.seq_len,
        "seed": config.train.seed,
        "vocab_size": model.vocab_size,
        "weight_tying": model.tie_embeddings,
        "sliding_window": None,
    }
    if model.stem_layers:
        sizes |= {"stem_layers": list(model.stem_layers), "stem_embedding_dim": model.ffn_dim}
    return {"model": sizes, "distributed": {"model_dtype": _MODEL_DTYPES[dtype]}}


def read_official(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """params.json and the tensors of a `consolidated` folder, or of the one above it.

    Only tensors are read from the files: code that a pickle may hold is refused, not run.

    Raises:
        InputError: missing or unreadable files, tensors of another dtype than float32, float16 and
            bfloat16, or a table that is in both files with different values.
    """
    params, folder = read_params(path), _folder(path)
    loaded = _load(folder / _BACKBONE)
    tensors = _arrays(loaded.get("model", loaded), folder / _BACKBONE)
    if (folder / _TABLES).is_file():
        tables = _arrays(_load(folder / _TABLES), folder / _TABLES)
        for name in tables.keys() & tensors.keys():
            if not same_values(tables[name], tensors[name]):
                raise InputError(
                    f"{name} in {folder / _BACKBONE} differs from {name} in {folder / _TABLES}; "
                    "remove the file whose tables are not those of the checkpoint, or consolidate "
                    "it again"
                )
        tensors |= tables
    return params, tensors


def read_params(path: Path) -> dict[str, Any]:
    """params.json alone.

    Raises:
        InputError: it is missing or unreadable.
    """
    folder = f"give the {FOLDER} folder of a checkpoint of the official code"
    params = read_json(_folder(path) / _PARAMS, "--path=", folder, constants=True)
    return dict(Fields(params, _PARAMS, folder).values)


def official_model_values(
    params: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The values of our model section that params.json and the shape of the FFN give.

    Raises:
        InputError: params.json lacks a key, or asks for what we have not.
    """
    model = Fields(params, _PARAMS, _REMEDY).inner("model")
    dim, heads = model.integer("dim", least=1), model.integer("n_heads", least=1)
    values = {
        "vocab_size": model.integer("vocab_size", least=1),
        "embed_dim": dim,
        "num_layers": model.integer("n_layers", least=1),
        "num_heads": heads,
        "num_kv_heads": model.integer("n_kv_heads", heads, least=1),
        "head_dim": model.integer("head_dim", dim // heads, least=1),
        "stem_layers": model.integers("stem_layers", ()),
        "tie_embeddings": model.boolean("weight_tying", False),
        "norm_eps": model.number("norm_eps"),
        "rope_theta": model.number("rope_theta"),
        "init_base_std": model.number("init_base_std", None),
        "init_std_factor": model.text("init_std_factor", "disabled"),
    }
    if model.values.get("sliding_window"):
        raise InputError(
            f"{_PARAMS}: model.sliding_window={model.values['sliding_window']} is not supported; "
            "only models that attend to the whole document can be imported"
        )
    gate = "layers.0.feed_forward.w1.weight"
    found = [tensor for name, tensor in tensors.items() if name.endswith(gate)]
    if not found:
        raise InputError(f"{_BACKBONE} has no {gate}; it is not a checkpoint of a transformer")
    if found[0].ndim != 2:
        raise InputError(f"{_BACKBONE}: {gate} is {found[0].shape}, expected a matrix; {_REMEDY}")
    # The formula behind it needs two more values, which not every file has.
    return values | {"ffn_dim": found[0].shape[0]}


def official_context(params: Mapping[str, Any]) -> int:
    """Tokens that the model was trained with; raises InputError if that is no number."""
    return Fields(params, _PARAMS, _REMEDY).inner("model").integer("max_seqlen", 0) or 1024


def official_tokenizer(params: Mapping[str, Any], path: Path) -> tuple[str, Path | None] | None:
    """Kind and file of the tokenizer that params.json names; None if it is not here.

    The file beside the weights comes first: folders are moved and copied, and another file may lie
    where this one was.
    """
    try:
        entry = (params.get("data") or {}).get("tokenizer") or {}
        name, named = entry.get("name"), Path(entry.get("path") or "")
    except (AttributeError, TypeError) as error:
        raise InputError(
            f"{_PARAMS}: data.tokenizer is not {{name, path}}; give the tokenizer by --tokenizer "
            "and --tokenizer-path"
        ) from error
    kind = next((ours for ours, theirs in _TOKENIZERS.items() if theirs == name), None)
    if kind in (None, "bytes"):
        return None if kind is None else (kind, None)
    places = (path / FOLDER / named.name, path / named.name, named)
    return next(((kind, place) for place in places if place.is_file()), None)


def import_torch():
    """The torch module.

    Raises:
        InputError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            "the official format is that of torch.save: pip install torch (the CPU build will do)"
        ) from error
    return torch


def _mapped_tensors(
    saved: SavedModel, folder: Path, prefix: str, dtype: np.dtype
) -> dict[str, np.ndarray]:
    """All tensors under the official names, in a file in `folder`."""
    pairs = list(official_pairs(saved.model))
    tables = official_table_names(saved.model)
    shapes = {prefix + pair.official: pair.official_shape for pair in pairs}
    shapes |= dict.fromkeys(tables, (saved.model.vocab_size, saved.model.ffn_dim))
    total = 8 * sum(int(np.prod(shape)) for shape in shapes.values())
    with SafetensorsWriter(folder, shapes, dtype, total) as writer:
        for pair in pairs:
            writer.write(prefix + pair.official, pair.to_official(saved.param(pair.ours)))
        for ids, columns, rows_nxSxC in saved.table_pieces() if tables else ():
            for index, name in enumerate(tables):
                writer.write_rows(name, ids, columns, rows_nxSxC[:, index])
    return read_file(folder / SINGLE_FILE)


def _check_space(model: ModelConfig, folder: Path, dtype: np.dtype, out: Path) -> None:
    """All of it is there at once: the temporary file, the model with its tables, the tables."""
    backbone = sum(int(np.prod(pair.shape)) for pair in official_pairs(model))
    tables = model.num_stem_layers * model.vocab_size * model.ffn_dim
    needed, free = (2 * backbone + 3 * tables) * dtype.itemsize, shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"--format=official takes {needed / 2**30:.1f} GiB for --out={out}, with a temporary "
            f"file, and {free / 2**30:.1f} GiB are free; free some, or choose another --out"
        )


def _save(torch, value: dict[str, Any], path: Path, out: Path) -> None:
    try:
        torch.save(value, path)
    except RuntimeError as error:
        # What torch makes of a write that failed; it does not say why.
        raise InputError(
            f"{path.name} of --out={out} cannot be written; the disk may be full: free some space, "
            "or choose another --out"
        ) from error


def _to_torch(array: np.ndarray, torch):
    kind = torch.bfloat16 if array.dtype == BFLOAT16 else torch.float32
    with warnings.catch_warnings():
        # The array is read-only; nothing writes to the tensor.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array.view(np.uint8)).view(kind)


def _arrays(tensors: Any, path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, which stay mapped."""
    torch = import_torch()
    if not isinstance(tensors, dict):
        raise InputError(
            f"{path} holds a {type(tensors).__name__} as its model, expected a dictionary of "
            "tensors; consolidate the checkpoint with the official code"
        )
    for name, value in tensors.items():
        if not isinstance(name, str):
            raise InputError(f"{path} has the key {name!r}, expected names of tensors; remove it")
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{path}: {name} is not a tensor; remove it")
        if value.layout != torch.strided or value.is_meta:
            kind = "meta" if value.is_meta else str(value.layout).removeprefix("torch.")
            raise InputError(
                f"{path}: {name} is a {kind} tensor; save it as a dense tensor on the CPU"
            )
    return {name: _to_numpy(name, tensor) for name, tensor in tensors.items()}


def _to_numpy(name: str, tensor) -> np.ndarray:
    torch = import_torch()
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.int16).numpy().view(BFLOAT16)
    if tensor.dtype not in (torch.float32, torch.float16):
        raise InputError(
            f"{name} has dtype {tensor.dtype}; convert it to float32, float16 or bfloat16 first"
        )
    return tensor.detach().numpy()


def _load(path: Path) -> dict[str, Any]:
    torch = import_torch()
    if not path.is_file():
        raise InputError(f"{path} is missing; consolidate the checkpoint with the official code")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises what its unpickler and its reader meet
        # Its message advises to run the code.
        asked = re.search(r"\bGLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else "it is damaged, or of another format"
        raise InputError(
            f"{path} cannot be read as tensors alone ({reason}); a file with other objects or code "
            "is not loaded: save it again with torch.save and tensors only"
        ) from error
    if not isinstance(loaded, dict):
        raise InputError(
            f"{path} holds a {type(loaded).__name__}, expected a dictionary of tensors"
        )
    return loaded


def _tokenizer_entry(tokenizer: Tokenizer, home: Place, with_tokenizer: bool) -> dict[str, Any]:
    if not with_tokenizer:
        return {"name": None, "path": None}
    if tokenizer.kind not in _TOKENIZERS:
        raise InputError(
            f"tokenizer kind {tokenizer.kind!r} has no counterpart in the official code; give "
            "--no-tokenizer"
        )
    file = tokenizer.file_name
    path = None if file is None else f"{home}/{FOLDER}/{file}"
    return {"name": _TOKENIZERS[tokenizer.kind], "path": path}


def _ffn_sizes(model: ModelConfig) -> dict[str, Any]:
    """The two values from which the official code computes F: up to a multiple of 8/3 D times m."""
    third = int(2 * 4 * model.embed_dim / 3)
    if -(-third // 256) * 256 == model.ffn_dim:
        return {"ffn_dim_multiplier": None, "multiple_of": 256}
    # In the middle between two integers, so that rounding does not matter.
    return {"ffn_dim_multiplier": (model.ffn_dim + 0.5) / third, "multiple_of": 1}


def _folder(path: Path) -> Path:
    return path / FOLDER if (path / FOLDER).is_dir() else path
