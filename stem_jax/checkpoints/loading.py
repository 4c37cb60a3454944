"""A trained run opened for reading: configuration, parameters, table and tokenizer."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from stem_jax.bucket import is_folder
from stem_jax.bucket_files import opened
from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.files import FOLDER, check_plain, check_whole
from stem_jax.checkpoints.inference_mesh import inference_mesh
from stem_jax.checkpoints.tables import first_rows, stores_for
from stem_jax.config import MEMORY_SECTIONS, Config, keys_of, model_keys
from stem_jax.config_checks import validate
from stem_jax.config_keys import Role
from stem_jax.data.tokenizer import Tokenizer, load_tokenizer_folder
from stem_jax.errors import InputError
from stem_jax.local_copy import checkpoints_of
from stem_jax.memory.catalogue import memories, read_row_format
from stem_jax.memory.memory import STEM
from stem_jax.tables.disk_store import DiskStore
from stem_jax.tables.offloaded_rows import OffloadedRows, caught_up_store
from stem_jax.tables.row_source import ResidentRows, RowSource
from stem_jax.tables.sharded_table import ShardedTable
from stem_jax.tables.spec import TableSpec, TableState
from stem_jax.tables.update_history import UpdateHistory
from stem_jax.training.blueprint import Blueprint, Params
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import abstract_state

# Of runs that keep the norm of another; with another list all their patches would be refused.
_TRAINED_BY = (
    "train.init_from",
    "train.continue_from",
    "train.seed",
    "train.global_batch_size",
    "train.seq_len",
    "data.sources",
    "optimizer.learning_rate",
    "tables.lr_multiplier",
    "tables.trained_words",
)


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A checkpoint of a run on devices of this process.

    config: as trained, but for the mesh and the attention kernel, which are this machine's.
    step: of the checkpoint. params: backbone by dotted name. rows: of each memory, up to date,
    wherever they lie.
    """

    config: Config
    step: int
    params: Params
    rows: Mapping[str, RowSource]
    tokenizer: Tokenizer
    mesh: Mesh

    @property
    def fingerprint(self) -> str:
        """What edits of these rows name."""
        return self.fingerprints[0]

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """See `checkpoint_fingerprints`."""
        norm = np.asarray(self.params["norm.scale"])
        return checkpoint_fingerprints(self.config, self.step, self.tokenizer, norm)

    def close(self) -> None:
        """Ends the threads that bring rows from the host, if there are any."""
        for source in self.rows.values():
            source.close()

    def with_rows(self, name: str, rows: RowSource) -> "LoadedRun":
        """The run with other rows of a memory."""
        return dataclasses.replace(self, rows={**self.rows, name: rows})


def checkpoint_fingerprints(
    config: Config, step: int, tokenizer: Tokenizer, norm_D: np.ndarray
) -> tuple[str, ...]:
    """sha256 (hex) that tells checkpoints apart: by step, tokenizer, model and final norm.

    Runs that keep the norm of another are told apart by how they trained; a second one is that
    which earlier versions gave them, by which patches of then may name them.
    """
    # The kernel is this machine's, not the checkpoint's.
    model = dataclasses.asdict(dataclasses.replace(config.model, attention="auto"))
    # Fingerprints of before these keys stay what they were.
    model.pop("matmul_dtype")
    for field, key in model_keys().items():
        if (key.kind or key.of_kind) and config.model.is_as_before(field):
            model.pop(field)
    facts = [step, tokenizer.fingerprint, model]
    # Those of models without these memories stay what they were.
    facts += [[name, _shape_of(config, name)] for name in memories(config) if name != STEM]
    if config.lora.rank:
        facts.append(["lora", dataclasses.asdict(config.lora)])
    found = [_digest(facts, norm_D)]
    if config.lora.rank or not config.optimizer.trains_backbone:
        facts.append(["frozen", [config.value_of(name) for name in _TRAINED_BY]])
        found.insert(0, _digest(facts, norm_D))
    return tuple(found)


def _digest(facts: list[Any], norm_D: np.ndarray) -> str:
    digest = hashlib.sha256(json.dumps(facts, default=list).encode())
    digest.update(norm_D.astype(np.float32).tobytes())
    return digest.hexdigest()


def _shape_of(config: Config, section: str) -> dict[str, Any]:
    """What the keys of a section say of the model."""
    shaping = (name for name in keys_of(Role.SHAPE) if name.startswith(f"{section}."))
    return {name: config.value_of(name) for name in shaping}


@dataclasses.dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint that is open for reading. tokenizer: the one that it was trained with."""

    checkpoints: Checkpointer
    step: int
    info: CheckpointInfo
    tokenizer: Tokenizer


@contextlib.contextmanager
def open_checkpoint(
    workdir: str | Path, step: int | None = None, flag: str = "--workdir"
) -> Iterator[FoundCheckpoint]:
    """Opens a checkpoint of a run, of which no array is read yet, for this process alone.

    Args:
        workdir: a run folder, as given to `stem_jax.train`.
        step: of the checkpoint; None is the newest.
        flag: that named the folder, for messages.

    Raises:
        InputError: no such folder, run, checkpoint or tokenizer, a tokenizer that the checkpoint
            was not trained with, or a damaged file.
    """
    workdir = opened(workdir, flag)
    if not workdir.is_dir():
        wrong = "is no folder" if workdir.exists() else "does not exist"
        raise InputError(f"{flag}={workdir} {wrong}; give the folder of a training run")
    if not is_folder(checkpoints_of(workdir)):
        raise InputError(
            f"{flag}={workdir} has no {FOLDER} folder: nothing was trained there; run python -m "
            f"stem_jax.train --config=... --workdir={workdir} first"
        )
    with Checkpointer(workdir, read_only=True, alone=True) as checkpoints:
        found = checkpoints.latest_step() if step is None else step
        if found is None:
            raise InputError(
                f"{flag}={workdir} has no complete checkpoint yet; wait for the first one, or "
                "train with a lower checkpoint.every"
            )
        folder, other = checkpoints.folder / str(found), "give another --step"
        if found in checkpoints.steps():
            check_plain(folder, other)
        info = checkpoints.info(found)
        if info.config.checkpoint.verify:
            check_whole(folder, other, optimizer=False)
        tokenizer = load_tokenizer_folder(workdir / "tokenizer")
        check_tokenizer(info, tokenizer, workdir / "tokenizer")
        yield FoundCheckpoint(checkpoints, found, info, tokenizer)


def check_tokenizer(info: CheckpointInfo, tokenizer: Tokenizer, folder: Path) -> None:
    """Raises InputError if the tokenizer, from `folder`, is not that of the checkpoint."""
    wrong = None
    if tokenizer.fingerprint != info.tokenizer:
        wrong = f"tokenizer {info.tokenizer[:12]}, {folder} holds {tokenizer.fingerprint[:12]}"
    elif info.special is not None and info.special != tokenizer.special:
        wrong = f"{info.special.difference(tokenizer.special)} as {folder} has it"
    if wrong:
        raise InputError(
            f"checkpoint {info.step} was trained with {wrong}; restore the original, or start in "
            "another --workdir"
        )


def load_run(
    workdir: str | Path,
    step: int | None = None,
    resident_rows: int | None = None,
    flag: str = "--workdir",
    devices: int = 1,
) -> LoadedRun:
    """Loads a checkpoint of `workdir` onto the first devices of this process.

    Args:
        workdir, step, flag: see `open_checkpoint`, as for what is raised.
        resident_rows: rows to keep on the device of each memory that has more, with the others in
            host memory; None: as many as in training.
        devices: among which parameters and rows are divided.

    Raises:
        InputError: see `open_checkpoint` and `inference_mesh`.
    """
    with open_checkpoint(workdir, step, flag) as found:
        info = found.info
        config, mesh = inference_mesh(_reading_config(info.config, resident_rows), devices)
        validate(config)
        blueprint = Blueprint(config, mesh)
        specs = blueprint.specs
        stores = stores_for(info, {n: s for n, s in specs.items() if n not in info.disk}, mesh)
        for name, saved in info.disk.items():
            spec = specs[name]
            if spec.offloaded:
                stores[name] = DiskStore.to_read(spec, mesh, first_rows(info, name, spec), saved)
        abstract = abstract_state(blueprint)
        # Nothing is updated here: the copies that training reads are enough.
        # Where they lie is said, too: else they would go to the first device of process 0.
        copies: Any = {
            name: jax.ShapeDtypeStruct(p.shape, config.model.param_dtype, sharding=p.sharding)
            for name, p in abstract.params.items()
        }
        abstract = dataclasses.replace(abstract, params=copies)
        params, tables = found.checkpoints.restore_model(found.step, abstract, stores)
    schedule = make_schedule(config, info.updates + 1, past=info.past)
    rows: dict[str, RowSource] = {}
    for name, spec in blueprint.specs.items():
        history, row_format = schedule.tables[name], read_row_format(config, spec)
        if name in stores and stores[name].first is not None:
            # Not all at once: of a large table few are asked for.
            policy = config.tables.cache_policy
            rows[name] = OffloadedRows(stores[name], mesh, policy, info.updates, history)
        elif name in stores:
            store = caught_up_store(stores[name], info.updates, history, row_format)
            rows[name] = OffloadedRows(store, mesh, config.tables.cache_policy)
        else:
            rows[name] = _resident_rows(spec, tables[name], info.updates, history, row_format, mesh)
    return LoadedRun(config, found.step, params, rows, found.tokenizer, mesh)


def _resident_rows(
    spec: TableSpec,
    table: TableState,
    updates: int,
    history: UpdateHistory,
    row_format: str,
    mesh: Mesh,
) -> RowSource:
    """The rows as the next training step would see them; the checkpoint holds some that lag."""

    def caught_up(rows, others) -> jax.Array:
        table = dataclasses.replace(others, rows=rows)
        return ShardedTable(spec, mesh, 1).caught_up_rows(table, updates, history, row_format)

    # Beside rows and moments, nothing of their size.
    nothing: Any = None
    others = dataclasses.replace(table, rows=nothing)
    rows = jax.jit(caught_up, donate_argnums=0)(table.rows, others)
    return ResidentRows(rows, spec, mesh)


def _reading_config(config: Config, resident_rows: int | None) -> Config:
    """The configuration for this machine, but for its mesh."""
    changed: dict[str, Any] = {}
    if resident_rows is not None:
        for section in ("tables", *MEMORY_SECTIONS):
            own = getattr(config, section)
            changed[section] = dataclasses.replace(own, resident_rows=resident_rows)
        # Rows of dense AdamW never lag behind, like those of the lazy one, which may be offloaded.
        optimizer = config.tables.optimizer.replace("dense_adamw", "lazy_adamw")
        changed["tables"] = dataclasses.replace(changed["tables"], optimizer=optimizer)
    # The kernels it was trained with may not exist on this platform.
    changed["model"] = dataclasses.replace(config.model, attention="auto", matmul_dtype=None)
    return dataclasses.replace(config, **changed)
