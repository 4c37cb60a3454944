"""Differences of two variants, paired by seed, with Student's intervals and verdicts on claims."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from scipy import stats

LEVEL = 0.95
# Sides that a claim may take, see `verdict_of`.
SIDES = ("below", "above", "equal", "no_worse")


def student(level: float, degrees: int) -> float:
    """The factor of the standard error in a two-sided interval of this level."""
    return float(stats.t.ppf((1 + level) / 2, degrees))


@dataclasses.dataclass(frozen=True)
class Interval:
    """Of a mean of `seeds` values. half_width: None where fewer than two seeds allow none."""

    mean: float
    half_width: float | None
    seeds: int
    level: float

    @property
    def low(self) -> float | None:
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        return None if self.half_width is None else self.mean + self.half_width

    def to_dict(self) -> dict:
        """As JSON holds it, with both ends."""
        return {**dataclasses.asdict(self), "low": self.low, "high": self.high}


def paired(
    values: Mapping[int, float | None], against: Mapping[int, float | None]
) -> dict[int, float]:
    """Differences by seed, where both have a finite value, in order of the seeds."""
    found = {}
    for seed in sorted(set(values) & set(against)):
        one, other = values[seed], against[seed]
        if one is not None and other is not None and math.isfinite(one - other):
            found[seed] = one - other
    return found


def interval_of(
    values: Sequence[float],
    level: float = LEVEL,
    factor: Callable[[float, int], float] = student,
) -> Interval | None:
    """The mean with its two-sided interval; None of no values, without half-width of one.

    Args:
        level: the share of such intervals that hold the true mean, if values are normal.
        factor: of the standard error, by level and degrees of freedom.
    """
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Interval(mean, None, len(values), level)
    error = _standard_error(values, mean)
    return Interval(mean, factor(level, len(values) - 1) * error, len(values), level)


def half_width_to_come(values: Sequence[float], seeds: int, level: float = LEVEL) -> float | None:
    """What `seeds` values would have if they spread as these do; None of fewer than two."""
    if min(len(values), seeds) < 2:
        return None
    error = _standard_error(values, math.fsum(values) / len(values))
    return student(level, seeds - 1) * error * math.sqrt(len(values) / seeds)


def bounds_of(side: str, margin: float) -> tuple[float, ...]:
    """Differences that decide a claim: an interval that holds none of them resolves it."""
    return {"equal": (-margin, margin), "no_worse": (margin,)}.get(side, (0.0,))


def verdict_of(interval: Interval | None, side: str, margin: float) -> str:
    """confirmed, refuted or unresolved.

    Args:
        side: of the difference: below or above zero; equal, so inside the margin around zero;
            no_worse, so below the margin, where less is better.
    """
    if interval is None or interval.half_width is None:
        return "unresolved"
    low, high = interval.mean - interval.half_width, interval.mean + interval.half_width
    bounds = bounds_of(side, margin)
    if any(low <= bound <= high for bound in bounds):
        return "unresolved"
    claimed = {
        "below": high < 0,
        "above": low > 0,
        "equal": -margin < low and high < margin,
        "no_worse": high < margin,
    }[side]
    return "confirmed" if claimed else "refuted"


def resolving_p(values: Sequence[float], side: str, margin: float) -> float:
    """The p at which `verdict_of` begins to resolve: intervals of level 1 - p touch a bound.

    1 for fewer than two values, which resolve nothing.
    """
    if len(values) < 2:
        return 1.0
    mean = math.fsum(values) / len(values)
    error = _standard_error(values, mean)
    found = []
    for bound in bounds_of(side, margin):
        if error == 0:
            found.append(1.0 if mean == bound else 0.0)
        else:
            score = abs(mean - bound) / error
            found.append(float(2 * stats.t.sf(score, len(values) - 1)))
    return max(found)


def holm_levels(p_values: Sequence[float], level: float = LEVEL) -> list[float]:
    """The level at which the interval of each claim is read, by Holm's steps.

    The claim with the smallest p of m is read at 1 - alpha / m, the next at 1 - alpha / (m - 1),
    and so on; where one stays unresolved, all that follow are read at its level, and so stay
    unresolved with it.
    """
    alpha = 1 - level
    found = [0.0] * len(p_values)
    left, stopped = len(p_values), False
    for place in sorted(range(len(p_values)), key=lambda place: (p_values[place], place)):
        found[place] = 1 - alpha / left
        stopped = stopped or p_values[place] > alpha / left
        if not stopped:
            left -= 1
    return found


def correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Pearson's, of at least three pairs that differ; else None."""
    if len(pairs) < 3:
        return None
    means = [math.fsum(column) / len(pairs) for column in zip(*pairs)]
    parts = [(x - means[0], y - means[1]) for x, y in pairs]
    spread = math.fsum(x * x for x, _ in parts) * math.fsum(y * y for _, y in parts)
    return math.fsum(x * y for x, y in parts) / math.sqrt(spread) if spread > 0 else None


def _standard_error(values: Sequence[float], mean: float) -> float:
    squares = math.fsum((value - mean) ** 2 for value in values)
    return math.sqrt(squares / (len(values) - 1) / len(values))
