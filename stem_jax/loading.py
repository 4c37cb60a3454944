"""A trained run opened for reading: configuration, parameters, table and tokenizer."""

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from stem_jax.checkpoint import FOLDER, Checkpointer
from stem_jax.config import Config
from stem_jax.data.tokenizer import Tokenizer, load_tokenizer_folder
from stem_jax.errors import InputError
from stem_jax.mesh import make_mesh
from stem_jax.tables.sharded_table import ShardedTable
from stem_jax.tables.spec import TableSpec, TableState
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import ModelDef, Params, abstract_state


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A checkpoint of a run on one device.

    config: as trained, but for the mesh and the attention kernel, which are this machine's.
    step: of the checkpoint. params: backbone by dotted name. rows: [V_pad, S, F] up to date; None
    for a dense model.
    """

    config: Config
    step: int
    params: Params
    rows: jax.Array | None
    tokenizer: Tokenizer
    mesh: Mesh


def load_run(workdir: str | Path, step: int | None = None) -> LoadedRun:
    """Loads a checkpoint of `workdir` onto the first device.

    Args:
        workdir: a run folder, as given to `stem_jax.train`.
        step: of the checkpoint; None is the newest.

    Raises:
        InputError: no such folder, run, checkpoint or tokenizer, or a tokenizer that the checkpoint
            was not trained with.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise InputError(f"--workdir={workdir} does not exist; give the folder of a training run")
    if not (workdir / FOLDER).is_dir():
        raise InputError(
            f"--workdir={workdir} has no {FOLDER} folder: nothing was trained there; run python -m "
            f"stem_jax.train --config=... --workdir={workdir} first"
        )
    with Checkpointer(workdir, read_only=True) as checkpoints:
        found = checkpoints.latest_step() if step is None else step
        if found is None:
            raise InputError(
                f"--workdir={workdir} has no complete checkpoint yet; wait for the first one, or "
                "train with a lower checkpoint.every"
            )
        info = checkpoints.info(found)
        # The tokenizer is checked first: it takes no time, the arrays may take minutes.
        tokenizer = load_tokenizer_folder(workdir / "tokenizer")
        if tokenizer.fingerprint != info.tokenizer:
            raise InputError(
                f"checkpoint {found} was trained with tokenizer {info.tokenizer[:12]}, "
                f"{workdir / 'tokenizer'} holds {tokenizer.fingerprint[:12]}; restore the original"
            )
        config = _on_one_device(info.config)
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        model = ModelDef(config, mesh)
        params, table = checkpoints.restore_model(found, abstract_state(config, model, mesh))
    rows = None if table is None else _caught_up(config, table, info.updates, mesh)
    return LoadedRun(config, found, params, rows, tokenizer, mesh)


def _caught_up(config: Config, table: TableState, updates: int, mesh: Mesh) -> jax.Array:
    """The rows as the next training step would see them; the checkpoint holds some that lag."""
    schedule = make_schedule(config, updates + 1)
    sharded = ShardedTable(TableSpec.from_config(config), mesh, 1)
    return jax.jit(sharded.caught_up_rows)(table, updates, schedule.table)


def _on_one_device(config: Config) -> Config:
    return dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1),
        # The kernel it was trained with may not exist on this platform.
        model=dataclasses.replace(config.model, attention="auto"),
    )
