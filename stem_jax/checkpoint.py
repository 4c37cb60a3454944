"""Checkpoints: everything a run is, through Orbax, and nothing else knows Orbax.

A checkpoint holds the items `params`, `opt_state`, `table_rows`, `table_slots` (mu, nu, last_step),
`data` (where the data stream stands), `config` and `layout` (format, V_pad, A, tokenizer). Arrays
are stored whole, so a checkpoint restores on any mesh; a step folder appears under its final name
only when it is complete.
"""

import dataclasses
import functools
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from stem_jax.agreement import is_first, unanimous
from stem_jax.checkpoint_files import (
    FOLDER,
    FORMAT_VERSION,
    ITEMS,
    PLAIN_ITEMS,
    TABLE_ITEMS,
    check_format,
    write_list,
)
from stem_jax.checkpoint_params import (
    param_targets,
    plain,
    restored_params,
    saved_params,
    unplain,
)
from stem_jax.checkpoint_tables import (
    copy_of_table,
    room_for_table,
    saved_store,
    table_on_devices,
    table_targets,
)
from stem_jax.config import Config
from stem_jax.config_file import config_from_json
from stem_jax.data.special_tokens import SpecialTokens
from stem_jax.errors import InputError
from stem_jax.files import write_whole
from stem_jax.older_formats import current_tree
from stem_jax.store_handler import table_handler
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.spec import TableSpec, TableState
from stem_jax.tables.store_snapshot import StoreSnapshot
from stem_jax.training.past_updates import NO_PAST, PastUpdates
from stem_jax.training.state import TrainState

_BEST = "eval/loss"


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """The plain part of a checkpoint.

    step: batches consumed. updates: optimizer updates completed. bad_steps: skipped batches in a
    row. touched_rows: rows that some update had. tokenizer: fingerprint of the tokenizer whose ids
    key the tables. data: seed, sources. past: see `schedule.learning_rates`. owes_validation: a
    stop came before the validation of this step. special: the tokenizer's special tokens; None in
    checkpoints that did not say yet. format: that it was read in; what is saved has the newest.
    """

    step: int
    updates: int
    bad_steps: int
    touched_rows: int
    tokenizer: str
    data: dict[str, Any]
    config: Config
    past: PastUpdates = NO_PAST
    owes_validation: bool = False
    special: SpecialTokens | None = None
    format: int = FORMAT_VERSION


class Checkpointer:
    """Reads and writes the checkpoints of one work folder. Close it, or use it as a context."""

    def __init__(
        self, workdir: str | Path, *, keep: int = 2, read_only: bool = False, alone: bool = False
    ):
        """Args:
        keep: newest checkpoints to keep, beside the best.
        read_only: nothing is made or cleaned up.
        alone: this process reads for itself, and waits for no other one.
        """
        processes = ocp.options.MultiprocessingOptions()
        if alone:
            own = jax.process_index()
            processes = ocp.options.MultiprocessingOptions(
                primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
            )
        self.folder = Path(workdir).absolute() / FOLDER
        policies = checkpoint_managers
        best = functools.partial(policies.BestN, get_metric_fn=lambda m: m[_BEST], reverse=True)
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            read_only=read_only,
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(keep), best(n=1, keep_checkpoints_without_metrics=False)]
            ),
            cleanup_tmp_directories=not read_only,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._list_files),
            multiprocessing_options=processes,
        )
        registry = ocp.DefaultCheckpointHandlerRegistry()
        for item in ("table_rows", "table_slots"):
            handler = table_handler()
            registry.add(item, ocp.args.PyTreeSave, handler)
            registry.add(item, ocp.args.PyTreeRestore, handler)
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, handler_registry=registry
        )
        self._snapshot: StoreSnapshot | None = None
        # The step under way, and its validation loss.
        self._saving: tuple[int, float | None] | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Waits for saves under way and releases the threads."""
        try:
            self._manager.close()
        finally:
            self._drop_snapshot()

    def wait(self) -> None:
        """Returns when every save so far is on disk.

        Raises:
            InputError: the folder cannot be written.
        """
        try:
            self._manager.wait_until_finished()
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            self._drop_snapshot()

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
        store: HostStore | None = None,
    ) -> None:
        """Starts an asynchronous save; the state may be donated as soon as this returns.

        Args:
            state: of the run.
            info: the plain part.
            eval_loss: decides which checkpoint is the best; None for no validation.
            store: has the table, resident rows included, in place of `state.table`. It may be
                written to as soon as this returns; the checkpoint holds what it held before.

        Raises:
            InputError: the folder cannot be written.
        """
        layout = TableSpec.from_config(info.config).layout
        items = {
            "data": ocp.args.JsonSave(
                {
                    "step": info.step,
                    "updates": info.updates,
                    "bad_steps": info.bad_steps,
                    "touched_rows": info.touched_rows,
                    **info.past.record(),
                    **({"owes_validation": True} if info.owes_validation else {}),
                    **info.data,
                }
            ),
            "config": ocp.args.JsonSave(json.loads(info.config.to_json())),
            "layout": ocp.args.JsonSave(
                {
                    "format": FORMAT_VERSION,
                    "num_rows": layout.num_rows,
                    "multiplier": layout.multiplier,
                    "tokenizer": info.tokenizer,
                    "special_tokens": None if info.special is None else info.special.record(),
                }
            ),
        }
        metrics = None if eval_loss is None else {_BEST: eval_loss}
        started = False
        try:
            # The save before must be done with its snapshot and step; Orbax would wait anyway.
            self.wait()
            self._saving = (info.step, eval_loss)
            params, opt_state = saved_params((state.params, state.opt_state))
            items["params"] = ocp.args.StandardSave(params)
            items["opt_state"] = ocp.args.StandardSave(plain(opt_state))
            if store is not None:
                self._snapshot = store.snapshot()
                items |= saved_store(store, self._snapshot)
            elif state.table is not None:
                # No snapshot to close: nobody writes to a copy, which is gone once it is on disk.
                copied = copy_of_table(info.config, state.table)
                items |= saved_store(copied, copied.snapshot())
            started = self._manager.save(
                info.step, args=ocp.args.Composite(**items), metrics=metrics
            )
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            if not started:
                self._drop_snapshot()

    def add_eval_loss(self, step: int, loss: float) -> None:
        """Gives a checkpoint, in every process, the loss that it was saved without.

        Raises:
            InputError: the folder cannot be written.
        """
        with unanimous():
            if is_first():
                _write_loss(self.folder / str(step), loss)
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
        missing = [name for name in (*ITEMS, *TABLE_ITEMS) if not (folder / name).is_dir()]
        if "layout" not in missing:
            # First: another format may have other items.
            found = self._restore(step, {"layout": ocp.args.JsonRestore()})
            check_format(folder, found["layout"]["format"])
        if not set(ITEMS).isdisjoint(missing):
            raise self._damaged(step, f"without {', '.join(missing)}")
        found = self._restore(step, {name: ocp.args.JsonRestore() for name in PLAIN_ITEMS})
        layout, data = found["layout"], dict(found["data"])
        info = CheckpointInfo(
            past=PastUpdates.taken_from(data),
            owes_validation=data.pop("owes_validation", False),
            step=data.pop("step"),
            updates=data.pop("updates"),
            bad_steps=data.pop("bad_steps"),
            touched_rows=data.pop("touched_rows"),
            tokenizer=layout["tokenizer"],
            special=self._special(step, layout.get("special_tokens")),
            data=data,
            config=self._config(step, found["config"]),
            format=layout["format"],
        )
        spec = TableSpec.from_config(info.config)
        if spec.vectors and missing:
            raise self._damaged(step, f"without {', '.join(missing)}")
        if (layout["num_rows"], layout["multiplier"]) != (
            spec.layout.num_rows,
            spec.layout.multiplier,
        ):
            raise InputError(
                f"checkpoint {folder} spreads {layout['num_rows']} rows by "
                f"{layout['multiplier']}, its configuration gives {spec.layout.num_rows} by "
                f"{spec.layout.multiplier}; it was written by another version"
            )
        return info

    def restore(
        self, step: int, abstract: TrainState, store: HostStore | None = None
    ) -> TrainState:
        """Restores a state into the shapes, dtypes and shardings of `abstract`.

        With a store, the table is read into it, those fields that it has, and the state has none.

        Raises:
            InputError: no such checkpoint, or a damaged one; a store then holds parts of it.
        """
        info = self.info(step)
        passing = None if store else room_for_table(info.config, abstract.table)
        params, opt_state = param_targets((abstract.params, abstract.opt_state))
        items = {
            "params": ocp.args.StandardRestore(params),
            "opt_state": ocp.args.StandardRestore(plain(opt_state)),
            **table_targets(store or passing),
        }
        found = self._restore(step, items)
        tree = found["params"], unplain(found["opt_state"], opt_state)
        del found
        tree = current_tree(tree, info.format, info.config.model)
        params, opt_state = restored_params(tree, abstract.params)
        counters: dict[str, Any] = {
            name: jax.device_put(np.int32(getattr(info, name)), getattr(abstract, name).sharding)
            for name in ("step", "updates", "bad_steps", "touched_rows")
        }
        table = table_on_devices(passing, abstract.table)
        return TrainState(**counters, params=params, opt_state=opt_state, table=table)

    def restore_model(
        self, step: int, abstract: TrainState, store: HostStore | None = None
    ) -> tuple[dict, TableState | None]:
        """Restores the parameters, by layer, and the table: not the backbone's optimizer state.

        With a store, the table is read into it as `restore` does, and returned as None.
        """
        info = self.info(step)
        passing = None if store else room_for_table(info.config, abstract.table)
        items = {"params": ocp.args.StandardRestore(param_targets(abstract.params))}
        found = self._restore(step, items | table_targets(store or passing))
        params = current_tree(found["params"], info.format, info.config.model)
        return params, table_on_devices(passing, abstract.table)

    def _list_files(self) -> None:
        """Called when all files of a step are written, before its folder gets its final name."""
        assert self._saving is not None
        step, loss = self._saving
        [folder] = [path for path in self.folder.glob(f"{step}.*") if path.is_dir()]
        if loss is not None:
            _write_loss(folder, loss)
        write_list(folder)

    def _drop_snapshot(self) -> None:
        if self._snapshot is not None:
            self._snapshot.close()
            self._snapshot = None

    def _special(self, step: int, record: dict[str, Any] | None) -> SpecialTokens | None:
        where = f"checkpoint {self.folder / str(step)}"
        return None if record is None else SpecialTokens.from_record(record, where)

    def _config(self, step: int, raw: dict[str, Any]) -> Config:
        try:
            return config_from_json(json.dumps(raw))
        except InputError as error:
            raise InputError(
                f"checkpoint {self.folder / str(step)} was written by another version of stem_jax, "
                f"with other configuration keys ({error}); use that version"
            ) from error

    def _restore(self, step: int, items: dict[str, Any]):
        try:
            with warnings.catch_warnings():
                # Restoring fewer items than were saved is meant.
                warnings.simplefilter("ignore")
                return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            # Where a value cannot be read, Orbax raises a bare Exception from the reason.
            cause = error.__cause__ if type(error) is Exception else error
            if not isinstance(cause, OSError | KeyError | ValueError):
                raise
            reason = " ".join(str(cause).split())[:300]
            raise self._damaged(step, f"{type(cause).__name__}: {reason}") from error

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(
            f"cannot write a checkpoint to {self.folder}: {error.strerror or error}; free space, "
            "or choose another --workdir"
        )

    def _damaged(self, step: int, reason: str) -> InputError:
        return InputError(
            f"checkpoint {self.folder / str(step)} is incomplete or damaged ({reason}); delete "
            "that folder to go on from the one before"
        )


def _write_loss(folder: Path, loss: float) -> None:
    """Puts the validation loss where Orbax reads it when it opens the folder again.

    It would write it itself if it chose the best one by a function of its options, and then warns
    of every checkpoint that has none.
    """
    write_whole(folder / "metrics" / "metrics", json.dumps({_BEST: loss}))
