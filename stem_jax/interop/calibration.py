"""What a conversion reads and trains, and its flags."""

import argparse
import dataclasses
from collections.abc import Mapping

from stem_jax.data.sources import parse_sources
from stem_jax.errors import InputError
from stem_jax.storage import local_path

# Keys of the configuration that flags of the conversion stand for.
_NOT_FOLLOWED = {
    "optimizer.learning_rate": "--table-rate",
    "tables.lr_multiplier": "--table-rate",
    "optimizer.schedule_steps": "--table-steps",
    "train.steps": "--table-steps",
}


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What a conversion reads and trains.

    sources: the text, as `data.sources`; None for that of the configuration. tokens: that the means
    are taken over, at most one pass. steps: of training the tables. learning_rate: its peak.
    """

    sources: str | None = None
    tokens: int = 1_000_000
    steps: int = 300
    learning_rate: float = 5e-3

    def __post_init__(self):
        if self.sources is not None:
            for spec in parse_sources(self.sources, "--calibration-text"):
                local_path(spec.source, "--calibration-text")
        if self.tokens < 1:
            raise InputError(f"--calibration-tokens={self.tokens} must be at least 1")
        if self.steps < 0:
            raise InputError(f"--table-steps={self.steps} must be 0 or more")
        if not 0 < self.learning_rate < 1:
            raise InputError(f"--table-rate={self.learning_rate} must be between 0 and 1")

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        """The flags that `from_flags` reads."""
        group = parser.add_argument_group("a Llama as a STEM model")

        def add(name: str, **options) -> None:
            group.add_argument(f"--{name}", **options)

        add("stem-layers", help="layers whose up projections become tables: as third, or 1,3")
        add("calibration-text", help="as data.sources, for their rows; without it, that")
        add("calibration-tokens", type=int, default=cls.tokens, help="that rows are means over")
        add("table-steps", type=int, default=cls.steps, help="of training the tables alone")
        add("table-rate", type=float, default=cls.learning_rate, help="peak learning rate of it")

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> "Calibration":
        """Raises InputError for values out of range."""
        return cls(
            args.calibration_text, args.calibration_tokens, args.table_steps, args.table_rate
        )


def check_overrides(overrides: Mapping[str, str]) -> None:
    """Raises InputError for keys that a conversion does not follow."""
    for key, flag in _NOT_FOLLOWED.items():
        if key in overrides:
            raise InputError(
                f"--config.{key}={overrides[key]} does not apply to --stem-layers, whose tables "
                f"are trained as {flag} says; give that, and this one to the run that follows"
            )
