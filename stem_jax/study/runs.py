"""Runs of a study and the phases that ask for them."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    study: its name. purpose: of the phase that asks for it first. tokens: positions trained on.
    rate: times the base's learning rate. seed: of parameters and of the text's order.
    """

    study: str
    purpose: str
    variant: str
    text: str
    tokens: int
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and record; runs of one name are one run, whatever asks for them."""
        return f"{self.text}.{self.variant}.n{self.tokens}.r{self.rate:.3g}.s{self.seed}"

    def record(self) -> dict[str, Any]:
        """As records name it."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Phase:
    """Runs that answer one question: every variant with every seed, share and rate.

    purpose: a word, in records. says: a line for people.
    variants, seeds, text: of its runs. shares: of the study's N tokens.
    rates: times the base's; None: of each variant the one that was chosen on the rate runs, of
    those without such runs the baseline's.
    compares: a variant that a user adds belongs here, too.
    """

    purpose: str
    says: str
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    text: str = "prose"
    shares: tuple[float, ...] = (1.0,)
    rates: tuple[float, ...] | None = None
    compares: bool = False


# Of the phase whose runs choose each variant's rate.
RATE = "rate"
# Of the phase whose runs the headline compares.
MAIN = "main"


def runs_of(study: Any, phase: Phase, chosen: dict[str, float]) -> list[Run]:
    """The runs of a phase, seed by seed, so that a cut leaves whole pairs.

    Args:
        study: a `study.Study`.
        chosen: of each variant the rate of its other runs; without one the baseline's, or 1.
    """
    otherwise = chosen.get(study.baseline, 1.0)
    return [
        Run(
            study.name,
            phase.purpose,
            variant,
            phase.text,
            study.tokens_of(share, phase.text),
            rate,
            seed,
        )
        for seed in phase.seeds
        for share in phase.shares
        for variant in phase.variants
        for rate in (phase.rates or (chosen.get(variant, otherwise),))
    ]


def chosen_rates(records: list[dict[str, Any]]) -> dict[str, float]:
    """Of each variant the rate with the fewest dev bits per byte; of two equal ones the lower.

    Args:
        records: of finished runs, of any purpose.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        run = record["run"]
        if run["purpose"] == RATE:
            bits = record["measures"].get("dev_bits_per_byte", float("inf"))
            found.setdefault(run["variant"], []).append((bits, run["rate"]))
    return {variant: min(trials)[1] for variant, trials in found.items()}
