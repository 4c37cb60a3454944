"""What a new run begins with: the newest checkpoint of another work folder, or its weights."""

import dataclasses
from collections.abc import Collection
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from stem_jax.bucket import is_folder
from stem_jax.bucket_files import opened
from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.files import FOLDER, check_plain, check_whole
from stem_jax.checkpoints.tables import stores_for
from stem_jax.config import MEMORY_SECTIONS, Config, keys_of
from stem_jax.config_keys import Role
from stem_jax.errors import InputError
from stem_jax.local_copy import checkpoints_of
from stem_jax.memory.catalogue import table_specs, with_eos
from stem_jax.model.lora import is_of_adapters
from stem_jax.model.readers import READERS
from stem_jax.model.transformer import reader_of
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.offloaded_rows import caught_up_store
from stem_jax.tables.sharded_table import ShardedTable
from stem_jax.tables.spec import TableSpec
from stem_jax.training.blueprint import Params
from stem_jax.training.past_updates import NO_PAST, PastUpdates
from stem_jax.training.resume import changed_keys, check_continuable, flag_of
from stem_jax.training.schedule import learning_rates, make_schedule
from stem_jax.training.state import TrainState, abstract_state, init_state, table_key
from stem_jax.training.step import TrainStep


@dataclasses.dataclass(frozen=True)
class Origin:
    """A checkpoint that a new run begins with. key: of the configuration, that names its folder."""

    key: str
    folder: Path
    info: CheckpointInfo

    @property
    def continues(self) -> bool:
        """Whether the run has the optimizer state and the steps, too."""
        return self.key == "train.continue_from"

    @property
    def step(self) -> int:
        """Of the run's first state."""
        return self.info.step if self.continues else 0

    @property
    def past(self) -> PastUpdates:
        """What the updates behind that state followed."""
        info = self.info
        if not self.continues:
            return NO_PAST
        return info.past.and_stage(info.step, info.updates, info.config)

    def check(self, config: Config) -> None:
        """Raises InputError if a run of this configuration cannot continue it, where it shall.

        Words of `tables.trained_words` are compared once they are tokens.
        """
        if self.continues:
            check_continuable(self.folder, self.info.step, self.info.config, config)

    def describe(self, config: Config) -> str:
        """What a run of this configuration takes over, in a line."""
        if not self.continues:
            fresh = ", ".join(
                [
                    *grafted(self.info.config, config),
                    *(["adapters"] if begins_adapters(self.info.config, config) else []),
                ]
            )
            more = f"; it has no {fresh}, which begin anew" if fresh else ""
            return f"beginning with checkpoint {self.info.step} of {self.folder}{more}"
        updates = self.info.updates
        rates = learning_rates(config, updates + 1, self.past)
        before = f"{rates[-2]:.3g}" if updates else "none"
        return (
            f"continuing checkpoint {self.step} of {self.folder} with its optimizer state: the "
            f"learning rate of its last update was {before}, that of the next is {rates[-1]:.3g}; "
            "the text begins anew"
        )


def find_origin(config: Config) -> Origin | None:
    """The checkpoint that `train.init_from` or `train.continue_from` names; None without.

    Raises:
        InputError: no checkpoint there, a damaged one, one of a model of another shape, or one that
            a run of this configuration cannot continue.
    """
    given = config.origins
    if not given:
        return None
    if len(given) > 1:
        both = " and ".join(f"{key}={folder}" for key, folder in given.items())
        raise InputError(f"{both}: a run begins with one checkpoint; set one of them to none")
    [(key, text)] = given.items()
    folder = opened(text, key)
    if not is_folder(checkpoints_of(folder)):
        raise InputError(
            f"{key}={folder} has no {FOLDER} folder; give the work folder of a run, or of an import"
        )
    with Checkpointer(folder, read_only=True) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise InputError(f"{key}={folder} has no complete checkpoint yet")
        there = checkpoints.folder / str(step)
        remedy = "delete that folder to begin with the one before"
        check_plain(there, remedy)
        info = checkpoints.info(step)
        if config.checkpoint.verify:
            # The verdict is that of all processes, see `run.train`.
            share = jax.process_index(), jax.process_count()
            check_whole(there, remedy, optimizer=key == "train.continue_from", share=share)
    origin = Origin(key, folder, info)
    _check_shapes(origin, config)
    origin.check(config)
    return origin


def grafted(there: Config, here: Config) -> list[str]:
    """Memories that a run has and its origin has not."""
    return [
        section
        for section in MEMORY_SECTIONS
        if getattr(here, section).layers and not getattr(there, section).layers
    ]


def begins_adapters(there: Config, here: Config) -> bool:
    """Whether a run has adapters, and its origin none."""
    return here.lora.rank > 0 and there.lora.rank == 0


def _check_shapes(origin: Origin, here: Config) -> None:
    there = origin.info.config
    here = with_eos(here, there.ngram.eos_id)
    # Optimizer state that is continued has no place for them.
    free = () if origin.continues else grafted(there, here)
    if free and here.optimizer.train != "all":
        raise InputError(
            f"{origin.key}={origin.folder} has no {', '.join(free)}: its rows and what reads them "
            f"begin anew and learn together, and optimizer.train={here.optimizer.train} keeps one "
            "of them as it begins; set it to all"
        )
    if begins_adapters(there, here) and not origin.continues:
        free = (*free, "lora")
    changed = changed_keys(there, here)
    for shaping in keys_of(Role.SHAPE):
        before, now = there.value_of(shaping), here.value_of(shaping)
        if shaping in changed and shaping.partition(".")[0] not in free:
            raise InputError(
                f"{origin.key}={origin.folder} was trained with {shaping}={before}, this run has "
                f"{now}; add {flag_of(there, shaping)}"
            )


def begin_from(origin: Origin, programs: TrainStep) -> tuple[TrainState, dict[str, HostStore]]:
    """The first state of a run. Offloaded tables are in the stores and not in the state.

    A run that continues the origin's has what is in its checkpoint, bit for bit. Others are at step
    0 with its parameters and rows and fresh optimizer state; rows that lag behind catch up with the
    last update of the origin first. Memories that the origin has not begin as those of a new run
    do, and their readers silently, where they can.
    """
    config, mesh, info = programs.config, programs.mesh, origin.info
    abstract = abstract_state(programs.blueprint)
    if origin.continues:
        stores = stores_for(info, programs.reads.specs, mesh)
        with Checkpointer(origin.folder, read_only=True) as checkpoints:
            return checkpoints.restore(info.step, abstract, stores), stores
    specs, fresh = _specs_there(info.config, config), grafted(info.config, config)
    adapted = begins_adapters(info.config, config)
    histories = make_schedule(info.config, info.updates + 1, past=info.past).tables
    stores = stores_for(info, specs, mesh)
    old = dataclasses.replace(
        abstract,
        params={
            n: p
            for n, p in abstract.params.items()
            if reader_of(n) not in fresh and not (is_of_adapters(n) and adapted)
        },
        tables={name: abstract.tables[name] for name in specs},
    )
    with Checkpointer(origin.folder, read_only=True) as checkpoints:
        params, tables = checkpoints.restore_model(info.step, old, stores)
    if fresh:
        params |= _silent_readers(programs, fresh)
    if adapted:
        params |= programs.model.init_adapters(mesh)
    here, rows = programs.reads.specs, {}
    for name in list(stores):
        store = caught_up_store(
            stores.pop(name), info.updates, histories[name], here[name].row_format
        )
        stores[name] = _with_fresh_moments(here[name], mesh, store)
    for name, table in tables.items():
        caught_up_rows = ShardedTable(specs[name], mesh, 1).caught_up_rows
        catch_up = jax.jit(caught_up_rows, static_argnames="dtype")
        rows[name] = catch_up(table, info.updates, histories[name], dtype=here[name].row_format)
    for name in fresh:
        if here[name].offloaded:
            stores[name] = HostStore.create(here[name], table_key(config, name), mesh)
    return init_state(programs.blueprint, params, rows), stores


def _silent_readers(programs: TrainStep, names: Collection[str]) -> Params:
    """The first parameters of these memories' readers, by layer."""
    found = {}
    for name, value in programs.model.init(programs.mesh).items():
        memory = reader_of(name)
        if memory is None or memory not in names:
            continue
        reader = programs.reads.memories[memory].reader
        assert reader is not None, "it has parameters"
        silent = tuple(f".{of_reader}" for of_reader in READERS[reader].silent)
        found[name] = jnp.zeros_like(value) if name.endswith(silent) else value
    return found


def _with_fresh_moments(spec: TableSpec, mesh: Mesh, rows: HostStore) -> HostStore:
    """A store that takes over the rows of another, which have its format already."""
    if rows.first is None:
        store = HostStore.zeros(spec, mesh)
    else:
        store = HostStore.empty(spec, mesh, rows.first)
    blocks = [
        dataclasses.replace(
            block, arrays={**block.arrays, "rows": old.arrays["rows"]}, kept=old.kept
        )
        for block, old in zip(store.blocks, rows.blocks, strict=True)
    ]
    return HostStore(spec, tuple(blocks), rows.first)


def _specs_there(there: Config, here: Config) -> dict[str, TableSpec]:
    """The origin's tables and their optimizers, placed as here."""
    tables = dataclasses.replace(
        there.tables,
        vocab_axes=here.tables.vocab_axes,
        resident_rows=here.tables.resident_rows,
        host_rows=None,
    )
    own = {
        section: dataclasses.replace(
            getattr(there, section),
            resident_rows=getattr(here, section).resident_rows,
            host_rows=None,
        )
        for section in MEMORY_SECTIONS
    }
    return table_specs(dataclasses.replace(there, tables=tables, **own))
