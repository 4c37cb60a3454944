"""The plain part of a checkpoint as JSON: what is noted of the data stream, and of the layout."""

from typing import Any

from stem_jax.checkpoints.chain import Base, bases_of, bases_record
from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.files import FORMAT_VERSION
from stem_jax.checkpoints.tables import (
    Stores,
    disks_of,
    first_rows_of,
    first_rows_record,
    saved_disks,
    table_layouts,
    touched_record,
    touched_rows_of,
)
from stem_jax.config import Config
from stem_jax.data.special_tokens import SpecialTokens
from stem_jax.memory.catalogue import table_specs
from stem_jax.training.past_updates import PastUpdates


def data_record(info: CheckpointInfo) -> dict[str, Any]:
    """Where the data stream and the updates stand."""
    return {
        "step": info.step,
        "updates": info.updates,
        "bad_steps": info.bad_steps,
        **touched_record(info.touched_rows),
        **info.past.record(),
        **({"owes_validation": True} if info.owes_validation else {}),
        **info.data,
    }


def layout_record(info: CheckpointInfo, stores: Stores, bases: dict[str, Base]) -> dict[str, Any]:
    """What the items are; rows on disk are saved now, in every process.

    Args:
        info: of the save.
        stores: see `Checkpointer.save`.
        bases: of tables of which what changed is saved.

    Raises:
        InputError: the disk is full in one of the processes.
    """
    return {
        "format": FORMAT_VERSION,
        **table_layouts(info.config),
        **first_rows_record(stores),
        **saved_disks(stores, info.step),
        **bases_record(bases),
        "tokenizer": info.tokenizer,
        "special_tokens": None if info.special is None else info.special.record(),
    }


def info_of(
    data: dict[str, Any], layout: dict[str, Any], config: Config, where: str
) -> CheckpointInfo:
    """The reverse.

    where: the records are, for messages.
    """
    data, memories = dict(data), table_specs(config)
    special = layout.get("special_tokens")
    return CheckpointInfo(
        past=PastUpdates.taken_from(data),
        owes_validation=data.pop("owes_validation", False),
        step=data.pop("step"),
        updates=data.pop("updates"),
        bad_steps=data.pop("bad_steps"),
        touched_rows=touched_rows_of(data, memories),
        tokenizer=layout["tokenizer"],
        special=None if special is None else SpecialTokens.from_record(special, where),
        first_rows=first_rows_of(layout, memories),
        disk=disks_of(layout, memories),
        bases=bases_of(layout, memories),
        data=data,
        config=config,
        format=layout["format"],
    )
