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

from stem_jax.config import Config
from stem_jax.errors import InputError
from stem_jax.tables.spec import TableSpec, TableState
from stem_jax.training.state import TrainState

FORMAT_VERSION = 1
FOLDER = "checkpoints"
_BEST = "eval/loss"
_ITEMS = ("params", "opt_state", "table_rows", "table_slots", "data", "config", "layout")


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """The plain part of a checkpoint.

    step: batches consumed. updates: optimizer updates completed. bad_steps: skipped batches in a
    row. tokenizer: fingerprint of the tokenizer whose ids key the tables. data: seed, sources.
    """

    step: int
    updates: int
    bad_steps: int
    tokenizer: str
    data: dict[str, Any]
    config: Config


class Checkpointer:
    """Reads and writes the checkpoints of one work folder. Close it, or use it as a context."""

    def __init__(self, workdir: str | Path, *, keep: int = 2, read_only: bool = False):
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
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Waits for saves under way and releases the threads."""
        self._manager.close()

    def wait(self) -> None:
        """Returns when every save so far is on disk; a failed save raises here."""
        self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """Complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest complete checkpoint, None without any."""
        return max(self.steps(), default=None)

    def save(self, state: TrainState, info: CheckpointInfo, eval_loss: float | None) -> None:
        """Starts an asynchronous save; the state may be donated as soon as this returns.

        Raises:
            InputError: the folder cannot be written.
        """
        layout = TableSpec.from_config(info.config).layout
        items = {
            "params": ocp.args.StandardSave(state.params),
            "opt_state": ocp.args.StandardSave(_plain(state.opt_state)),
            "data": ocp.args.JsonSave(
                {
                    "step": info.step,
                    "updates": info.updates,
                    "bad_steps": info.bad_steps,
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
                }
            ),
        }
        if state.table is not None:
            table = state.table
            slots = {"mu": table.mu, "nu": table.nu, "last_step": table.last_step}
            items["table_rows"] = ocp.args.StandardSave({"rows": table.rows})
            items["table_slots"] = ocp.args.StandardSave(slots)
        metrics = None if eval_loss is None else {_BEST: eval_loss}
        try:
            self._manager.save(info.step, args=ocp.args.Composite(**items), metrics=metrics)
        except OSError as error:
            raise InputError(
                f"cannot write a checkpoint to {self.folder}: {error.strerror or error}; free "
                "space, or choose another --workdir"
            ) from error

    def info(self, step: int) -> CheckpointInfo:
        """Reads the plain part of a checkpoint.

        Raises:
            InputError: no such checkpoint, an incomplete one, or one of a newer format.
        """
        if step not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise InputError(f"no checkpoint of step {step} in {self.folder}; there are: {known}")
        missing = [name for name in _ITEMS if not (self.folder / str(step) / name).is_dir()]
        names = ("data", "config", "layout")
        if not {*names, "params", "opt_state"}.isdisjoint(missing):
            raise self._damaged(step, f"without {', '.join(missing)}")
        found = self._restore(step, {name: ocp.args.JsonRestore() for name in names})
        layout, data = found["layout"], dict(found["data"])
        if layout["format"] > FORMAT_VERSION:
            raise InputError(
                f"checkpoint {self.folder / str(step)} has format {layout['format']}, this version "
                f"reads up to {FORMAT_VERSION}; update stem_jax"
            )
        info = CheckpointInfo(
            step=data.pop("step"),
            updates=data.pop("updates"),
            bad_steps=data.pop("bad_steps"),
            tokenizer=layout["tokenizer"],
            data=data,
            config=self._config(step, found["config"]),
        )
        spec = TableSpec.from_config(info.config)
        if spec.num_layers and missing:
            raise self._damaged(step, f"without {', '.join(missing)}")
        if (layout["num_rows"], layout["multiplier"]) != (
            spec.layout.num_rows,
            spec.layout.multiplier,
        ):
            raise InputError(
                f"checkpoint {self.folder / str(step)} spreads {layout['num_rows']} rows by "
                f"{layout['multiplier']}, its configuration gives {spec.layout.num_rows} by "
                f"{spec.layout.multiplier}; it was written by another version"
            )
        return info

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Restores a state into the shapes, dtypes and shardings of `abstract`."""
        info = self.info(step)
        items = {
            "params": ocp.args.StandardRestore(abstract.params),
            "opt_state": ocp.args.StandardRestore(_plain(abstract.opt_state)),
        }
        if abstract.table is not None:
            items |= _table_items(abstract.table)
        found = self._restore(step, items)
        treedef = jax.tree.structure(abstract.opt_state)
        counters = [
            jax.device_put(np.int32(value), target.sharding)
            for value, target in (
                (info.step, abstract.step),
                (info.updates, abstract.updates),
                (info.bad_steps, abstract.bad_steps),
            )
        ]
        return TrainState(
            *counters,
            params=found["params"],
            opt_state=jax.tree.unflatten(treedef, _unplain(found["opt_state"])),
            table=_table(found) if abstract.table is not None else None,
        )

    def restore_model(self, step: int, abstract: TrainState) -> tuple[dict, TableState | None]:
        """Restores the parameters and the table alone, without the backbone's optimizer state."""
        items = {"params": ocp.args.StandardRestore(abstract.params)}
        if abstract.table is not None:
            items |= _table_items(abstract.table)
        found = self._restore(step, items)
        return found["params"], _table(found) if abstract.table is not None else None

    def _config(self, step: int, raw: dict[str, Any]) -> Config:
        try:
            return Config.from_json(json.dumps(raw))
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
        except (OSError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise self._damaged(step, f"{type(error).__name__}: {reason}") from error

    def _damaged(self, step: int, reason: str) -> InputError:
        return InputError(
            f"checkpoint {self.folder / str(step)} is incomplete or damaged ({reason}); delete "
            "that folder to go on from the one before"
        )


def _plain(opt_state) -> dict[str, Any]:
    """The optimizer state as a flat dictionary: named tuples differ between optax versions."""
    return {f"{index:03d}": leaf for index, leaf in enumerate(jax.tree.leaves(opt_state))}


def _unplain(flat: dict[str, Any]) -> list[Any]:
    return [flat[key] for key in sorted(flat)]


def _table_items(table: TableState) -> dict[str, Any]:
    slots = {"mu": table.mu, "nu": table.nu, "last_step": table.last_step}
    return {
        "table_rows": ocp.args.StandardRestore({"rows": table.rows}),
        "table_slots": ocp.args.StandardRestore(slots),
    }


def _table(found) -> TableState:
    return TableState(rows=found["table_rows"]["rows"], **found["table_slots"])
