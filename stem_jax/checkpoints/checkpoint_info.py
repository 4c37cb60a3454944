"""The plain part of a checkpoint."""

import dataclasses
import json
from typing import Any

from stem_jax.checkpoints.chain import Base
from stem_jax.checkpoints.files import FORMAT_VERSION
from stem_jax.config import Config
from stem_jax.config_file import config_from_json
from stem_jax.data.special_tokens import SpecialTokens
from stem_jax.errors import InputError
from stem_jax.storage import Place
from stem_jax.tables.first_rows import FirstRows
from stem_jax.tables.saved_disk import SavedDisk
from stem_jax.training.past_updates import NO_PAST, PastUpdates


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """The plain part of a checkpoint.

    step: batches consumed. updates: optimizer updates completed. bad_steps: skipped batches in a
    row. touched_rows: of each memory, rows that some update had. tokenizer: fingerprint of the one
    whose ids key the tables. data: seed, sources. past: see `schedule.learning_rates`.
    owes_validation: a stop came before the validation of this step. special: the special tokens of
    the tokenizer; None in checkpoints that did not say yet. first_rows: of memories whose written
    rows alone are saved, how the others are made. disk: of those whose rows are on disk, where.
    bases: of those of which what changed is saved, what that builds on. format: that it was read
    in; what is saved has the newest.
    """

    step: int
    updates: int
    bad_steps: int
    touched_rows: dict[str, int]
    tokenizer: str
    data: dict[str, Any]
    config: Config
    past: PastUpdates = NO_PAST
    owes_validation: bool = False
    special: SpecialTokens | None = None
    first_rows: dict[str, FirstRows] = dataclasses.field(default_factory=dict)
    disk: dict[str, SavedDisk] = dataclasses.field(default_factory=dict)
    bases: dict[str, Base] = dataclasses.field(default_factory=dict)
    format: int = FORMAT_VERSION


def saved_config(checkpoint: Place, raw: dict[str, Any]) -> Config:
    """The configuration as a checkpoint has it.

    Raises:
        InputError: it has other keys.
    """
    try:
        return config_from_json(json.dumps(raw))
    except InputError as error:
        raise InputError(
            f"checkpoint {checkpoint} was written by another version of stem_jax, with other "
            f"configuration keys ({error}); use that version"
        ) from error
