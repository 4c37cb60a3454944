"""Figures as a reader sees them."""

from collections.abc import Mapping
from typing import Any

MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"


def plain(value: float | None, digits: int = 4) -> str:
    """A number with so many places behind the point; a dash for None."""
    return NONE if value is None else f"{value:,.{digits}f}".replace("-", MINUS)


def signed(value: float | None, digits: int = 4) -> str:
    """As `plain`, with a sign: a difference."""
    return NONE if value is None else f"{value:+.{digits}f}".replace("-", MINUS)


def interval(found: Mapping[str, Any] | None, digits: int = 4) -> str:
    """A difference with the half-width of its interval: "−0.0200 ± 0.0012"."""
    if found is None:
        return NONE
    if found["half_width"] is None:
        return f"{signed(found['mean'], digits)}, one seed: no interval"
    # Unbroken over the end of a line.
    return f"{signed(found['mean'], digits)}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}" + (
        f"{found['half_width']:.{digits}f}"
    )


def bounded(value: float | None, bound: str) -> str:
    """A multiplier: "1.25", "at least 1.50"."""
    return NONE if value is None else f"{bound} {value:.2f}".strip()


def count(number: float | None) -> str:
    """With three digits and a unit from a thousand on: "4.00 M"."""
    if number is None:
        return NONE
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # What rounds up to the next unit is shown in it.
        if number >= 0.9995 * size:
            value = number / size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return f"{number:.3g}"


def percent(share: float | None, digits: int = 0) -> str:
    """A share of one."""
    return NONE if share is None else f"{100 * share:.{digits}f}%"


def spoken(label: str) -> str:
    """The label of a variant or measure in a sentence."""
    return label.replace("_", " ")
