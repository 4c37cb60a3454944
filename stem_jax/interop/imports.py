"""What the three formats that can be imported hold, under our names."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stem_jax.config import ModelConfig, before, model_keys
from stem_jax.errors import InputError
from stem_jax.files import read_json
from stem_jax.interop.import_model import Imported
from stem_jax.interop.llama_config import llama_context, llama_model_values
from stem_jax.interop.llama_names import (
    EMBEDDING,
    HEAD,
    llama_shapes,
    llama_weights,
    table_names,
)
from stem_jax.interop.memory_names import (
    memory_shapes,
    memory_tables,
    memory_weights,
    read_memories,
)
from stem_jax.interop.names import (
    STEM_PREFIX,
    check_official,
    check_shapes,
    official_pairs,
    official_table_names,
    same_values,
)
from stem_jax.interop.official_format import (
    official_context,
    official_model_values,
    read_official,
)
from stem_jax.interop.safetensors_files import read_folder
from stem_jax.json_fields import Fields
from stem_jax.memory.memory import STEM

_REMEDY = "give the file that belongs to the model"
_ADAPTER = "adapter_config.json"
_FOLDER = "give the folder of a model of transformers"


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


def _official(path: Path) -> Imported:
    params, tensors = read_official(path)
    values = official_model_values(params, tensors)
    model = _model(values, tensors)
    prefix = STEM_PREFIX if any(name.startswith(STEM_PREFIX) for name in tensors) else ""
    check_official(tensors, model, prefix)

    def maker(pair):
        return lambda: pair.to_ours(tensors[prefix + pair.official])

    makers = {pair.ours: maker(pair) for pair in official_pairs(model)}
    rows = official_table_names(model)
    return Imported(
        values,
        official_context(params),
        LazyParams(makers),
        [tensors[name] for name in rows],
        param_names={pair.ours: prefix + pair.official for pair in official_pairs(model)},
        table_names={STEM: rows},
    )


def _transformers(kind: str, path: Path) -> Imported:
    # NaN and Infinity may stand in values that nobody here reads.
    read = read_json(path / "config.json", "--path=", _FOLDER, constants=True)
    config = Fields(read, "config.json", _REMEDY)
    found = config.text("model_type")
    if found not in {"hf": ("stem", "llama"), "llama": ("llama",)}[kind]:
        raise InputError(
            f"--path={path} holds a model of type {found!r}; --from={kind} reads "
            + {"hf": "exports of stem_jax and Llama models", "llama": "Llama models"}[kind]
        )
    if (path / _ADAPTER).is_file():
        # transformers puts it on top of the weights beside it, or of those that it names.
        raise InputError(
            f"--path={path} has {_ADAPTER}, an adapter that is not read; merge it into the model "
            "(merge_and_unload of peft) and save that, or give a copy without the adapter's files"
        )
    tensors = read_folder(path)
    # Older files carry the rotary frequencies along.
    tensors = {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    values = llama_model_values(config)
    model = _model(values, tensors)
    if model.tie_embeddings and HEAD in tensors:
        # Of the two mostly the head is left out, but both may be there, or the head alone.
        head = tensors.pop(HEAD)
        if not same_values(head, tensors.setdefault(EMBEDDING, head)):
            raise InputError(
                f"{HEAD} differs from {EMBEDDING}, but config.json has tie_word_embeddings=true; "
                "set it to false"
            )
    memories = read_memories(config, model.num_layers)
    check_shapes(tensors, llama_shapes(model) | memory_shapes(model, memories))

    def maker(weight):
        return lambda: weight.exchanged(tensors[weight.theirs])

    weights = *llama_weights(model), *memory_weights(model, memories)
    params = LazyParams({weight.ours: maker(weight) for weight in weights})
    names = {
        STEM: table_names(model),
        **{m: [*own] for m, own in memory_tables(model, memories).items()},
    }
    of_memories = {memory: [tensors[name] for name in own] for memory, own in names.items()}
    return Imported(
        values,
        llama_context(config),
        params,
        of_memories.pop(STEM),
        memories,
        of_memories,
        param_names={weight.ours: weight.theirs for weight in weights},
        table_names=names,
    )


def _model(values: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> ModelConfig:
    """A model of these sizes; the other values do not matter for its tensors.

    Raises:
        InputError: a size that is none, or more layers than there can be.
    """
    if values["head_dim"] < 1:
        raise InputError(
            f"the configuration beside the tensors gives {values['num_heads']} heads of a width of "
            f"{values['embed_dim']}; {_REMEDY}"
        )
    if values["num_layers"] > len(tensors):
        raise InputError(
            f"the configuration beside the tensors gives {values['num_layers']} layers, there are "
            f"{len(tensors)} tensors; {_REMEDY}"
        )
    others = {field: before(field) for field in model_keys()}
    return ModelConfig(**{**others, **values})
