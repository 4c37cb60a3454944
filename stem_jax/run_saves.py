"""What a run saves, and what a next start finds out about it."""

import dataclasses
from pathlib import Path
from typing import Any

from stem_jax.bucket_lock import BucketLock
from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.config import Config
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.errors import TrainingError
from stem_jax.local_copy import address_of
from stem_jax.lock import Lock
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.prefetch import Prefetch
from stem_jax.training.evaluation import Validation
from stem_jax.training.metrics import METRICS, read_records
from stem_jax.training.past_updates import PastUpdates
from stem_jax.training.run_data import RunData
from stem_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class RunSaves:
    """The saves of a run.

    data: of `data_record`. past: see `schedule.learning_rates`. stores, prefetches: of offloaded
    tables, by memory.
    """

    config: Config
    workdir: Path
    lock: Lock | BucketLock | None
    checkpoints: Checkpointer
    tokenizer: Tokenizer
    data: dict[str, Any]
    past: PastUpdates
    stores: dict[str, HostStore]
    prefetches: dict[str, Prefetch]

    def save(
        self, state: TrainState, validation: Validation | None, owes_validation: bool = False
    ) -> None:
        """Saves a state.

        Args:
            validation: of its step; None for none.
            owes_validation: a stop came before it.

        Raises:
            InputError: the folder cannot be written.
            TrainingError: another run took the folder.
        """
        other = None if self.lock is None else self.lock.lost_to()
        if other is not None:
            raise TrainingError(
                f"{address_of(self.workdir)} was taken by {other} while this process stood still; "
                "nothing more is written there, and that run goes on from the last checkpoint"
            )
        if self.prefetches:
            # While the save before still reads the stores, old rows would be kept for it.
            self.checkpoints.wait()
        for name, prefetch in self.prefetches.items():
            prefetch.write_back(vars(state.tables[name]))
        info = CheckpointInfo(
            step=int(state.step),
            updates=int(state.updates),
            bad_steps=int(state.bad_steps),
            touched_rows={name: int(n) for name, n in state.touched_rows.items()},
            tokenizer=self.tokenizer.fingerprint,
            data=self.data,
            config=self.config,
            past=self.past,
            owes_validation=owes_validation,
            special=self.tokenizer.special,
        )
        loss = None if validation is None else validation.loss
        self.checkpoints.save(state, info, loss, self.stores)

    def add_validation(self, step: int, validation: Validation) -> None:
        """Gives the checkpoint of a step the validation that it was saved without."""
        self.checkpoints.add_eval_loss(step, validation.loss)


def data_record(config: Config, data: RunData) -> dict[str, Any]:
    """What the data stream is a function of, beside the step."""
    return {
        "seed": config.train.seed,
        "sources": config.data.sources,
        "checksums": [store.meta.checksum for store in data.stores],
    }


def owes_validation(workdir: Path, info: CheckpointInfo | None) -> bool:
    """Whether the run still has to make the validation that a stop skipped."""
    if info is None or not info.owes_validation:
        return False
    made = {r["step"] for r in read_records(workdir / METRICS) if "eval/loss" in r}
    return info.step not in made
