"""What the measures of a run are called, their units, and where they can go no further."""

import dataclasses
import re

from stem_jax.errors import InputError

BITS, SHARE = "bits per byte", "share of questions"
HEADLINE = "test_bits_per_byte"
GROUPS = 10  # of test tokens by how often they were trained on


@dataclasses.dataclass(frozen=True)
class Measure:
    """title: as a reader knows it. better: "less", "more" or None where neither is.

    floor, ceiling: values that no run can pass, None where there is none; near: how near to one
    counts as at it, in the unit.
    """

    title: str
    unit: str
    better: str | None = "less"
    floor: float | None = None
    ceiling: float | None = None
    near: float = 0.0


_KNOWN = {
    HEADLINE: Measure("held-out bits per byte, test", BITS),
    "dev_bits_per_byte": Measure("held-out bits per byte, dev", BITS),
    "memorization_gap": Measure("memorisation gap", BITS, None),
    "memorization_held_out": Measure("bits per byte of unseen pieces of text", BITS),
    "memorization_seen": Measure("bits per byte of pieces trained on", BITS),
    "spikes": Measure("spikes of the loss", "spikes", floor=0),
    "gradient_norm_spread": Measure("spread of the gradient norm", "ratio"),
}
_SHARES = ("facts_", "induction", "needle")
_BY_FREQUENCY = {"input": "token read", "target": "token foretold"}


def measure_of(name: str) -> Measure:
    """What is known of a measure; one that nobody listed has its own name and no unit."""
    if name in _KNOWN:
        return _KNOWN[name]
    if found := re.fullmatch(r"(input|target)_frequency_(\d)", name):
        place = f"group {int(found[2]) + 1} of {GROUPS}"
        return Measure(
            f"bits per byte by frequency of the {_BY_FREQUENCY[found[1]]}, {place}", BITS
        )
    if name.startswith(_SHARES):
        # A hundredth of some thousand questions: differences below it are single answers.
        return Measure(name.replace("_", " "), SHARE, "more", 0, 1, 0.01)
    return Measure(name.replace("_", " "), "", None)


def is_known(name: str) -> bool:
    """Whether a measure has a unit here, so that claims can be made about it."""
    return measure_of(name).unit != ""


def check_known(name: str, where: str) -> Measure:
    """The measure of a name that somebody wrote.

    Raises:
        InputError: it is none.
    """
    if not is_known(name):
        raise InputError(
            f"{where}: {name} is no measure; take one of {', '.join(_KNOWN)}, "
            f"input_frequency_0 to _{GROUPS - 1}, target_frequency_0 to _{GROUPS - 1}, or one that "
            f"begins with {', '.join(_SHARES)}"
        )
    return measure_of(name)


def limit_reached(name: str, means: list[float]) -> str | None:
    """floor or ceiling if the means of all variants are there: then nothing can be told apart."""
    measure = measure_of(name)
    if not means:
        return None
    if measure.floor is not None and all(x <= measure.floor + measure.near for x in means):
        return "floor"
    if measure.ceiling is not None and all(x >= measure.ceiling - measure.near for x in means):
        return "ceiling"
    return None
