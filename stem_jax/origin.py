"""Where a new run takes its first parameters from: the newest checkpoint of another work folder."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from stem_jax.checkpoint import FOLDER, Checkpointer, CheckpointInfo
from stem_jax.config import Config
from stem_jax.errors import InputError
from stem_jax.storage import local_path
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.offloaded_rows import caught_up_store
from stem_jax.tables.sharded_table import ShardedTable
from stem_jax.tables.spec import TableSpec
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import TrainState, abstract_state, init_state
from stem_jax.training.step import TrainStep

# What a checkpoint's arrays are shaped by. All else may differ: rotary scaling, dtypes, data.
_SHAPING = """
    model.vocab_size model.embed_dim model.num_layers model.num_heads model.num_kv_heads
    model.head_dim model.ffn_dim model.stem_layers model.tie_embeddings tables.pad_multiple
    model.token_embedding_dropout
""".split()


@dataclasses.dataclass(frozen=True)
class Origin:
    """A checkpoint that a new run begins with."""

    folder: Path
    info: CheckpointInfo


def find_origin(config: Config) -> Origin | None:
    """The checkpoint that `train.init_from` names; None without.

    Raises:
        InputError: no checkpoint there, or one of a model of another shape.
    """
    if config.train.init_from is None:
        return None
    folder = local_path(config.train.init_from, "train.init_from")
    if not (folder / FOLDER).is_dir():
        raise InputError(
            f"train.init_from={folder} has no {FOLDER} folder; give the work folder of a run, or "
            "of an import"
        )
    with Checkpointer(folder, read_only=True) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise InputError(f"train.init_from={folder} has no complete checkpoint yet")
        info = checkpoints.info(step)
    for key in _SHAPING:
        section, name = key.split(".")
        there, here = (getattr(getattr(c, section), name) for c in (info.config, config))
        if there != here:
            raise InputError(
                f"train.init_from={folder} was trained with {key}={there}, this run has {here}; "
                f"set --config.{key} to the former"
            )
    return Origin(folder, info)


def begin_from(origin: Origin, programs: TrainStep) -> tuple[TrainState, HostStore | None]:
    """The state of step 0: parameters and rows of the origin, fresh optimizer state.

    Rows that lag behind catch up with the last update of the origin first. An offloaded table is in
    the store and not in the state.
    """
    config, mesh, info = programs.config, programs.mesh, origin.info
    spec = _spec_there(info.config, config)
    history = make_schedule(info.config, info.updates + 1, endless=info.endless).table
    store = HostStore.allocate(spec, mesh) if spec.offloaded else None
    abstract = abstract_state(config, programs.model, mesh)
    with Checkpointer(origin.folder, read_only=True) as checkpoints:
        params, table = checkpoints.restore_model(info.step, abstract, store)
    if store is not None:
        caught_up_store(store, info.updates, history)
        for block in store.blocks:
            for name in ("mu", "nu", "last_step"):
                block.arrays[name][...] = np.zeros((), block.arrays[name].dtype)
        store = HostStore(programs.spec, store.blocks)
    rows = None
    if table is not None:
        catch_up = jax.jit(ShardedTable(spec, mesh, 1).caught_up_rows)
        rows = catch_up(table, info.updates, history)
    return init_state(config, programs.model, mesh, params, rows), store


def _spec_there(there: Config, here: Config) -> TableSpec:
    """The origin's table and its optimizer, placed as here."""
    placement = {"vocab_axes": here.tables.vocab_axes, "resident_rows": here.tables.resident_rows}
    tables = dataclasses.replace(there.tables, **placement)
    return TableSpec.from_config(dataclasses.replace(there, tables=tables))
