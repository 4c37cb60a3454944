"""What a run was trained on up to a checkpoint, read from its own loader."""

import dataclasses
from pathlib import Path

import numpy as np

from stem_jax.checkpoints.loading import LoadedRun, open_checkpoint
from stem_jax.data.rows import CUT
from stem_jax.data.sources import OpenedSource
from stem_jax.data.trained_pairs import PairCounts, count_pairs
from stem_jax.errors import InputError
from stem_jax.training.run_data import open_run_data


@dataclasses.dataclass(frozen=True)
class TrainingText:
    """The text of a run's own batches; not that of a run which it began with or continues.

    times: of each source [rows] int64, how often each row of its training store was in a batch.
    """

    sources: tuple[OpenedSource, ...]
    times: tuple[np.ndarray, ...]
    seq_len: int
    vocab_size: int

    def pair_counts(self) -> PairCounts:
        """How often each id was trained on."""
        counts = [
            count_pairs(source.train, times_R, self.seq_len, self.vocab_size)
            for source, times_R in zip(self.sources, self.times, strict=True)
        ]
        inputs = np.sum([count.inputs_V for count in counts], axis=0)
        return PairCounts(inputs, np.sum([count.targets_V for count in counts], axis=0))


def open_training_text(run: LoadedRun, workdir: str | Path) -> TrainingText:
    """Opens the text that the checkpoint of a run was trained on.

    Args:
        workdir: of the run.

    Raises:
        InputError: nothing was trained there, or its text cannot be read or has changed.
    """
    with open_checkpoint(workdir, run.step) as found:
        info = found.info
    first = info.past.first_step
    if info.step <= first:
        raise InputError(
            f"--workdir={workdir} has no batch of its own behind checkpoint {info.step}, so that "
            "nothing is known of its training text; give a run that was trained here"
        )
    checksums = info.data["checksums"]
    config = info.config
    data = open_run_data(
        config, Path(workdir), prepared=True, checksums=checksums, first_step=first
    )
    if [store.meta.checksum for store in data.stores] != checksums:
        raise InputError(
            f"the text behind data.sources={config.data.sources!r} is not what checkpoint "
            f"{info.step} of {workdir} was trained on; bring it back"
        )
    if config.data.packing != CUT or any(store.scored is not None for store in data.stores):
        raise InputError(
            f"{workdir} was trained on conversations or on whole documents (data.packing=whole); "
            "what was learned by how often it was read is measured of rows that are cut from text "
            "(data.packing=cut) alone"
        )
    times = tuple(data.batches.times_read(info.step))
    return TrainingText(data.sources, times, config.train.seq_len, config.model.vocab_size)
