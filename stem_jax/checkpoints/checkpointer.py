"""Checkpoints: everything a run is, through Orbax, and nothing else knows Orbax.

A checkpoint holds the items `params`, `opt_state`, `table_rows`, `table_slots` (mu, nu, last_step;
`NAME_rows`, `NAME_moments` of other memories than STEM's), `data` (where the data stream stands),
`config` and `layout` (format, V_pad, A, tokenizer). Arrays are stored whole, so a checkpoint
restores on any mesh; a step folder appears under its final name only when it is complete.
"""

import functools
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from stem_jax.bucket import is_folder
from stem_jax.checkpoints.chain import KeptWithBases
from stem_jax.checkpoints.checkpoint_info import CheckpointInfo, saved_config
from stem_jax.checkpoints.file_list import listing
from stem_jax.checkpoints.files import (
    BEST,
    add_loss,
    check_format,
    write_loss,
)
from stem_jax.checkpoints.item_handlers import item_handlers, save_args
from stem_jax.checkpoints.items import ITEMS, PLAIN_ITEMS
from stem_jax.checkpoints.made_arrays import MadeArray
from stem_jax.checkpoints.older_formats import current_tree
from stem_jax.checkpoints.orbax_buckets import path_class_of
from stem_jax.checkpoints.params import (
    param_targets,
    plain,
    restored_params,
    saved_params,
    unplain,
)
from stem_jax.checkpoints.records import data_record, info_of, layout_record
from stem_jax.checkpoints.refusals import damaged, unreadable, writing
from stem_jax.checkpoints.table_saves import TableSaves
from stem_jax.checkpoints.tables import (
    Stores,
    made_items,
    needed_items,
    restored_items,
    save_name,
    table_layouts,
    table_targets,
    tables_on_devices,
)
from stem_jax.errors import InputError
from stem_jax.local_copy import checkpoints_of
from stem_jax.processes.agreement import PREPARING_SECONDS, is_first, unanimous
from stem_jax.storage import is_remote
from stem_jax.tables.disk_store import DiskStore
from stem_jax.tables.spec import TableState
from stem_jax.training.state import TrainState


class _Manager(ocp.CheckpointManager):
    """Saves what it is told to, and does not ask in between whether to stop."""

    def reached_preemption(self, step: int) -> bool:
        # The loop asks, by other numbers than steps: were these among them, the processes would
        # agree on a question that is hours away.
        return False

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except BaseException:
            # A process whose save failed would wait here for others that wait for it elsewhere.
            self._save_progress_tracker = _Over()
            raise


class _Over:
    """In place of what tells all processes whether a save is on its way: none is any more."""

    def set(self, value: bool) -> None:
        """Meets nobody."""

    def get(self) -> bool:
        """Whether one is."""
        return False


class Checkpointer:
    """Reads and writes the checkpoints of one work folder. Close it, or use it as a context."""

    def __init__(
        self,
        workdir: str | Path,
        *,
        keep: int = 2,
        full_every: int = 1,
        read_only: bool = False,
        alone: bool = False,
        before_commit: Callable[[], None] = lambda: None,
    ):
        """Args:
        workdir: of this machine; of a copy of one in a bucket, the checkpoints are there.
        keep: newest checkpoints to keep, beside the best.
        full_every: of so many saves of a table at least one has all its rows; others have those
            that changed since the save before. 0 or 1: every one has all.
        read_only: nothing is made or cleaned up.
        alone: this process acts by itself, in a folder that is there, and waits for no other one.
        before_commit: called, on a thread, when all files of a save are written and before it
            counts; what it raises, the save does.
        """
        processes = ocp.options.MultiprocessingOptions()
        if alone:
            own = jax.process_index()
            processes = ocp.options.MultiprocessingOptions(
                primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
            )
        self.folder = checkpoints_of(workdir)
        self._before_commit = before_commit
        best = functools.partial(policies.BestN, get_metric_fn=lambda m: m[BEST], reverse=True)
        some = [policies.LatestN(keep), best(n=1, keep_checkpoints_without_metrics=False)]
        self._kept = KeptWithBases(policies.AnyPreservationPolicy(some), self.folder)
        options = ocp.CheckpointManagerOptions(
            create=not (read_only or alone),
            read_only=read_only,
            preservation_policy=self._kept,
            cleanup_tmp_directories=not read_only,
            temporary_path_class=listing(path_class_of(self.folder)),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_loss),
            multiprocessing_options=processes,
        )
        with writing(self.folder):
            self._manager = _Manager(self.folder, options=options, handler_registry=item_handlers())
        self._tables = TableSaves(self.folder, full_every)
        # Whether rows on disk may be of checkpoints that are gone.
        self._untidy = True
        # The step under way, and its validation loss.
        self._saving: tuple[int, float | None] | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Waits for saves under way and releases the threads."""
        try:
            with writing(self.folder):
                self._manager.close()
        finally:
            self._tables.drop_snapshots()

    def wait(self) -> None:
        """Returns when every save so far is on disk.

        Raises:
            InputError: the folder cannot be written.
            TimeoutError: another process did not come to the end of it.
        """
        try:
            with writing(self.folder):
                self._manager.wait_until_finished()
        except (InputError, TimeoutError):
            self._tables.failed()
            raise
        finally:
            self._tables.drop_snapshots()

    def steps(self) -> list[int]:
        """Complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest complete checkpoint, None without any."""
        return max(self.steps(), default=None)

    def save(
        self,
        state: TrainState,
        info: CheckpointInfo,
        eval_loss: float | None,
        stores: Stores | None = None,
        made: Mapping[str, Mapping[str, MadeArray]] | None = None,
    ) -> None:
        """Starts an asynchronous save; the state may be donated as soon as this returns.

        Args:
            state: of the run; its parameters and optimizer state may be made arrays.
            info: the plain part.
            eval_loss: decides which checkpoint is the best; None for no validation.
            stores: of some memories, which have their tables, resident rows included, in place of
                `state.tables`. They may be written to as soon as this returns; the checkpoint holds
                what they held before.
            made: the fields of tables that nothing else has.

        Raises:
            InputError: the folder cannot be written.
        """
        items = {
            "data": ocp.args.JsonSave(data_record(info)),
            "config": ocp.args.JsonSave(json.loads(info.config.to_json())),
        }
        metrics = None if eval_loss is None else {BEST: eval_loss}
        started = False
        try:
            with writing(self.folder):
                # The save before must be done with its snapshot and step; Orbax would wait anyway.
                self.wait()
                self._saving = (info.step, eval_loss)
                params, opt_state = saved_params((state.params, state.opt_state))
                items["params"] = save_args(params)
                items["opt_state"] = save_args(plain(opt_state))
                stores = stores or {}
                self.tidy(stores)
                # Again, once this save is done.
                self._untidy = True
                items |= made_items(made or {})
                resident = {
                    name: table for name, table in state.tables.items() if name not in stores
                }
                of_tables, bases = self._tables.begin(info, resident, stores)
                items |= of_tables
                self._kept.will_build(info.step, bases.values())
                items["layout"] = ocp.args.JsonSave(layout_record(info, stores, bases))
                started = self._manager.save(
                    info.step, args=ocp.args.Composite(**items), metrics=metrics
                )
                if started:
                    self._tables.started()
        finally:
            if not started:
                self._tables.drop_snapshots()

    def tidy(self, stores: Stores) -> bool:
        """Drops the rows on disk that no checkpoint needs; False while a save is under way."""
        if not self._untidy:
            return True
        if self._manager.is_saving_in_progress():
            return False
        if disks := [store for store in stores.values() if isinstance(store, DiskStore)]:
            # When a write failed, Orbax does not count those that it was to displace; a folder on a
            # network may not show a new one yet.
            # A bucket has no folder before there is something in it.
            found = self.folder.iterdir() if is_folder(self.folder) else ()
            there = {int(path.name) for path in found if path.name.isdecimal()}
            for store in disks:
                store.keep([save_name(step) for step in there | set(self._manager.all_steps())])
        self._untidy = False
        return True

    def add_eval_loss(self, step: int, loss: float) -> None:
        """Gives a checkpoint, in every process, the loss that it was saved without.

        Raises:
            InputError: the folder cannot be written.
        """
        with unanimous():
            if is_first():
                add_loss(self.folder / str(step), loss)
        self._manager.reload()

    def info(self, step: int) -> CheckpointInfo:
        """Reads the plain part of a checkpoint.

        Raises:
            InputError: no such checkpoint, an incomplete one, or one of another format.
        """
        if step not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise InputError(f"no checkpoint of step {step} in {self.folder}; there are: {known}")
        folder = self.folder / str(step)
        missing = [name for name in ITEMS if not is_folder(folder / name)]
        if "layout" not in missing:
            # First: another format may have other items.
            found = self._restore(step, {"layout": ocp.args.JsonRestore()})
            check_format(folder, found["layout"]["format"])
        if missing:
            raise damaged(folder, f"without {', '.join(missing)}")
        found = self._restore(step, {name: ocp.args.JsonRestore() for name in PLAIN_ITEMS})
        where = f"checkpoint {folder}"
        info = info_of(found["data"], found["layout"], saved_config(folder, found["config"]), where)
        needed = needed_items(info.config, info.disk)
        if missing := [name for name in needed if not is_folder(folder / name)]:
            raise damaged(folder, f"without {', '.join(missing)}")
        for name, value in table_layouts(info.config).items():
            if (there := found["layout"].get(name)) != value:
                raise InputError(
                    f"checkpoint {folder} has {name} {there}, its configuration "
                    f"gives {value}; it was written by another version"
                )
        return info

    def restore(self, step: int, abstract: TrainState, stores: Stores | None = None) -> TrainState:
        """Restores a state into the shapes, dtypes and shardings of `abstract`.

        Tables for which there is a store are read into it, those fields that it has, and the state
        has the others.

        Raises:
            InputError: no such checkpoint, or a damaged one; a store then holds parts of it.
        """
        info = self.info(step)
        # Reads rows on disk, where others lie than in the stores.
        with unanimous(PREPARING_SECONDS):
            targets, passing = table_targets(info, abstract.tables, stores)
        params, opt_state = param_targets((abstract.params, abstract.opt_state))
        items = {
            "params": ocp.args.StandardRestore(params),
            "opt_state": ocp.args.StandardRestore(plain(opt_state)),
            **restored_items(targets, info),
        }
        self._restore_bases(info, targets)
        found = self._restore(step, items)
        self._tables.restored(info)
        tree = found["params"], unplain(found["opt_state"], opt_state)
        del found
        tree = current_tree(tree, info.format, info.config.model)
        params, opt_state = restored_params(tree, abstract.params)
        counters: dict[str, Any] = {
            name: jax.device_put(np.int32(getattr(info, name)), getattr(abstract, name).sharding)
            for name in ("step", "updates", "bad_steps")
        }
        touched_rows = {
            name: jax.device_put(np.int32(info.touched_rows[name]), target.sharding)
            for name, target in abstract.touched_rows.items()
        }
        return TrainState(
            **counters,
            touched_rows=touched_rows,
            params=params,
            opt_state=opt_state,
            tables=tables_on_devices(passing, abstract.tables),
        )

    def restore_model(
        self, step: int, abstract: TrainState, stores: Stores | None = None
    ) -> tuple[dict, dict[str, TableState]]:
        """Restores the parameters, by layer, and the tables: not the backbone's optimizer state.

        Tables for which there is a store are read into it as `restore` does, and not returned.
        """
        info = self.info(step)
        targets, passing = table_targets(info, abstract.tables, stores)
        items = {"params": ocp.args.StandardRestore(param_targets(abstract.params))}
        self._restore_bases(info, targets)
        found = self._restore(step, items | restored_items(targets, info))
        params = current_tree(found["params"], info.format, info.config.model)
        return params, tables_on_devices(passing, abstract.tables)

    def bases(self, info: CheckpointInfo) -> dict[int, list[str]]:
        """The memories of whose tables a checkpoint needs others, by their steps, oldest first.

        Raises:
            InputError: see `info`.
        """
        found: dict[int, list[str]] = {}
        for name in info.bases:
            above = info
            while (base := above.bases.get(name)) is not None:
                found.setdefault(base.step, []).append(name)
                above = self.info(base.step)
        return dict(sorted(found.items()))

    def _restore_bases(self, info: CheckpointInfo, stores: Stores) -> None:
        """Reads what the tables of a checkpoint build on, before what changed since."""
        for step, names in self.bases(info).items():
            wanted = {name: stores[name] for name in names if name in stores}
            if wanted:
                self._restore(step, restored_items(wanted, self.info(step)))

    def _write_loss(self) -> None:
        """Called when the items of a step are written, before its files are listed."""
        assert self._saving is not None
        step, loss = self._saving
        folder = self.folder / str(step)
        if not is_remote(folder):
            [folder] = [path for path in self.folder.glob(f"{step}.*") if path.is_dir()]
        if loss is not None:
            write_loss(folder, loss)
        self._before_commit()

    def _restore(self, step: int, items: dict[str, Any]):
        try:
            with warnings.catch_warnings():
                # Restoring fewer items than were saved is meant.
                warnings.simplefilter("ignore")
                return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            refusal = unreadable(self.folder / str(step), error)
            if refusal is None:
                raise
            raise refusal from error
