"""A checkpoint of step 0 from the tensors of another code.

The tensors are mapped files; what is made of them is read and written piece by piece, and nothing
of the model's size is in memory.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.files import FOLDER, check_outside
from stem_jax.checkpoints.made_arrays import MadeArray
from stem_jax.config import Config, ModelConfig, before, model_keys
from stem_jax.config_file import config_from_json, load_config
from stem_jax.config_keys import Role
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.errors import InputError
from stem_jax.files import new_folder
from stem_jax.interop.safetensors_files import forget, read_apart
from stem_jax.interop.said_keys import memories_beside_stem, unsaid_keys
from stem_jax.memory.catalogue import table_specs
from stem_jax.memory.memory import STEM
from stem_jax.tables.spec import TableSpec
from stem_jax.training.blueprint import ModelDef
from stem_jax.training.run_data import TOKENIZER_FOLDER
from stem_jax.training.state import TrainState

# Numbers of a leaf of the optimizer's that is computed; larger ones are moments.
_FEW = 64


@dataclasses.dataclass(frozen=True)
class Imported:
    """A model of another code under our names.

    model: values of the model section that it decides. context: tokens it was trained with. params:
    our parameters by name, in our layout. tables: [V, F] by token id, one for each STEM layer.
    memories: beside STEM's, the values of their sections. memory_tables: theirs, as `tables`.
    param_names, table_names: what its files call them, by our names of parameters and of memories.
    """

    model: dict[str, Any]
    context: int
    params: Mapping[str, np.ndarray]
    tables: list[np.ndarray]
    memories: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    memory_tables: Mapping[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    param_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    table_names: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


def import_config(
    imported: Imported, tokenizer: Tokenizer, path: str | Path, overrides: dict[str, str]
) -> Config:
    """The configuration of the new checkpoint: a config file, with the model as it was found.

    Args:
        path: the config file, for what the model does not decide.
        overrides: as of `load_config`; those of what the model decides are refused.

    Raises:
        InputError: such an override, a config file with a kind of model that was not found, or a
            model or a tokenizer that does not fit.
    """
    # What no other code has, such as the vector in place of dropped embeddings.
    shaping = [field for field, key in model_keys().items() if key.role is Role.SHAPE]
    unsaid = {field: before(field) for field in shaping if field not in imported.model}
    decided = {**unsaid, **imported.model}
    sections: dict[str, Mapping[str, Any]] = {"model": decided, **imported.memories}
    for section, values in sections.items():
        for field, value in values.items():
            if (name := f"{section}.{field}") in overrides:
                raise InputError(
                    f"--config.{name}={overrides[name]} is given, the model has {value}; leave the "
                    "flag out"
                )
    config = load_config(path, overrides)
    other = [*unsaid_keys(config.model, frozenset(ModelConfig.__dataclass_fields__) - {*unsaid})]
    # Sizes are the model's whatever the file has; what rows do, a file says on purpose.
    if config.model.stem_site not in (before("stem_site"), decided["stem_site"]):
        other.append("stem_site")
    for field in other:
        raise InputError(
            f"{path} has model.{field}={getattr(config.model, field)}, which the imported model is "
            "not; take it out of the file, or give another --config"
        )
    for key, layers in memories_beside_stem(config):
        if key.partition(".")[0] in imported.memories:
            continue
        raise InputError(
            f"{key}={layers} is a memory that the imported model has not; take it out of the flags "
            f"and of {path}. A run with train.init_from=WORKDIR begins one beside what was "
            "imported"
        )
    if config.lora.rank:
        raise InputError(
            f"lora.rank={config.lora.rank} begins adapters, which an import has not; leave it out, "
            "and train with train.init_from=WORKDIR and lora.rank beside what was imported"
        )
    train, data = config.train, config.data
    if "train.seq_len" not in overrides:
        train = dataclasses.replace(train, seq_len=imported.context)
    data = dataclasses.replace(data, tokenizer=tokenizer.kind, tokenizer_path=None)
    model = dataclasses.replace(config.model, **decided)
    own = {
        section: dataclasses.replace(getattr(config, section), **values)
        for section, values in imported.memories.items()
    }
    config = dataclasses.replace(config, model=model, train=train, data=data, **own)
    # What the files of the model say passes the same checks as what a config file says.
    config = config_from_json(config.to_json())
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.vocab_size}: it is "
            "not the one that the model was trained with; give that with --tokenizer-path"
        )
    return config


def write_checkpoint(
    imported: Imported, config: Config, tokenizer: Tokenizer, workdir: str | Path
) -> None:
    """Writes a work folder: checkpoint of step 0, configuration and tokenizer.

    Raises:
        InputError: the folder exists, or a parameter is not finite.
    """
    check_outside(workdir, "--workdir")
    specs = table_specs(config)
    model = ModelDef(config)
    # Whatever models compute in, checkpoints have float32.
    abstract = {n: jax.ShapeDtypeStruct(p.shape, np.float32) for n, p in model.shapes().items()}
    params: Any = {name: _param(imported, name, p.shape) for name, p in abstract.items()}
    opt_state = _begun(model.optimizer.init, abstract)
    tables = {STEM: imported.tables} if imported.tables else {}
    tables |= imported.memory_tables
    theirs = imported.table_names
    made = {
        name: _fields(spec, tables.get(name, []), theirs.get(name, []))
        for name, spec in specs.items()
    }
    zero: Any = np.int32(0)
    state = TrainState(zero, zero, zero, dict.fromkeys(specs, zero), params, opt_state, {})
    data = {"seed": config.train.seed, "sources": config.data.sources, "checksums": []}
    touched = dict.fromkeys(specs, 0)
    info = CheckpointInfo(
        0, 0, 0, touched, tokenizer.fingerprint, data, config, special=tokenizer.special
    )
    with new_folder(Path(workdir), "--workdir") as folder:
        tokenizer.save(folder / TOKENIZER_FOLDER)
        (folder / "config.json").write_text(config.to_json())
        (folder / FOLDER).mkdir()
        with Checkpointer(folder, alone=True) as checkpoints:
            checkpoints.save(state, info, None, made=made)
            checkpoints.wait()


def float32(value: np.ndarray) -> np.ndarray:
    """A tensor of any dtype that is imported, exactly."""
    return np.asarray(value, np.float32)


def _begun(init: Callable[[Any], Any], params: Mapping[str, jax.ShapeDtypeStruct]) -> Any:
    """The optimizer state to begin with: counts and coefficients as they are, moments of zeros."""

    def small():
        zeros = {name: jnp.zeros(p.shape, p.dtype) for name, p in params.items()}
        return [leaf for leaf in jax.tree.leaves(init(zeros)) if leaf.size <= _FEW]

    few = iter(jax.device_get(jax.jit(small)()))

    def made(leaf: jax.ShapeDtypeStruct) -> MadeArray:
        if leaf.size > _FEW:
            return MadeArray.zeros(leaf.shape, leaf.dtype)
        value = next(few)
        return MadeArray(leaf.shape, leaf.dtype, lambda: value)

    return jax.tree.map(made, jax.eval_shape(init, dict(params)))


def _param(imported: Imported, name: str, shape: tuple[int, ...]) -> MadeArray:
    theirs = imported.param_names.get(name)
    called = name if theirs is None else f"{theirs} ({name} here)"
    return MadeArray(shape, np.dtype(np.float32), lambda: _Finite(imported.params[name], called))


def _fields(
    spec: TableSpec, tables: list[np.ndarray], names: Sequence[str]
) -> dict[str, MadeArray]:
    """What a checkpoint has of a table, of which nothing was updated yet. names: of the tables in
    the file, none where they are not from there."""
    made = {f.name: MadeArray.zeros(spec.shape(f.name), f.dtype) for f in spec.fields}
    if tables:
        rows = spec.field("rows")
        source = _Rows(spec, tables, names)
        for table in tables:
            read_apart(table)
        made["rows"] = MadeArray(spec.shape("rows"), np.dtype(rows.dtype), lambda: source)
    return made


@dataclasses.dataclass(frozen=True)
class _Finite:
    """A tensor, part by part in float32, of which every number is looked at."""

    value: np.ndarray
    name: str

    def __getitem__(self, place) -> np.ndarray:
        # The part before was written.
        forget(self.value)
        part = float32(self.value[place])
        if not np.isfinite(part).all():
            raise InputError(f"{self.name} has values that are not finite; the file is damaged")
        return part


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows [rows, S, F] of a table, from tables by token id; padding rows are zero."""

    spec: TableSpec
    tables: list[np.ndarray]
    names: Sequence[str]

    def __getitem__(self, place: slice) -> np.ndarray:
        layout = self.spec.layout
        keys_n = layout.key_numbers(np.arange(place.start, place.stop))
        there_n = keys_n < layout.num_keys
        rows_nxSxF = np.zeros((len(keys_n), self.spec.vectors, self.spec.width), np.float32)
        for index, table in enumerate(self.tables):
            part = float32(table[keys_n[there_n]])
            bad = ~np.isfinite(part).all(axis=1)
            if bad.any():
                token = keys_n[there_n][bad][0]
                called = f"table {index}"
                if self.names:
                    called = f"{self.names[index]} ({called} here)"
                raise InputError(
                    f"{called} has rows that are not finite, such as token {token}'s; the file is "
                    "damaged"
                )
            rows_nxSxF[there_n, index] = part
            forget(table)
        return rows_nxSxF
