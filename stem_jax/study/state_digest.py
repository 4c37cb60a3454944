"""Whether two runs ended with the same bits."""

from pathlib import Path

import numpy as np

from stem_jax.checkpoints.loading import load_run
from stem_jax.study.record import digest_of
from stem_jax.tables.row_source import ResidentRows


def state_digest(workdir: Path) -> dict[str, str]:
    """SHA-256 of the newest checkpoint's parameters and rows, and of the tokenizer.

    Of rows that are not all on the device nothing is said: parameters and logits follow from them.
    """
    run = load_run(workdir)
    try:
        arrays = [(name, np.asarray(value)) for name, value in run.params.items()]
        arrays += [
            (f"rows of {name}", np.asarray(source.rows))
            for name, source in run.rows.items()
            if isinstance(source, ResidentRows)
        ]
        return {"params": digest_of(arrays), "tokenizer": run.tokenizer.fingerprint}
    finally:
        run.close()
