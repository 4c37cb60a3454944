"""What an analysis looks at."""

import dataclasses

from stem_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class AnalysisOptions:
    """What to look at, and with what.

    step, dense_step: checkpoints; None: the newest. resident_rows: kept on the device. text: as
    `data.sources`; None: what the run was trained on. text_field, format: as those keys; None: the
    run's. tokens: of the text, for frequencies and means; None: at most 262,144. rows: sampled
    tokens. seed: of the sample. progress: draw bars.
    """

    step: int | None = None
    dense_step: int | None = None
    resident_rows: int | None = None
    text: str | None = None
    text_field: str | None = None
    format: str | None = None
    tokens: int | None = None
    rows: int = 2048
    seed: int = 0
    progress: bool = True

    def __post_init__(self):
        """Raises InputError for a value out of range."""
        if self.rows < 2:
            raise InputError(f"--rows={self.rows} must be at least 2: angles are between pairs")
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"--tokens={self.tokens} must be at least 1")
        if self.seed < 0:
            raise InputError(f"--seed={self.seed} must be 0 or more")
