"""Numbers as people read them."""


def count(number: float) -> str:
    """Three digits and a unit: 980, 1.23 k, 45.6 M, 7.89 G."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # What rounds up to a thousand belongs to the next unit.
        if abs(number) >= 0.9995 * size:
            return f"{_three(number / size)} {unit}"
    return f"{number:.0f}" if float(number).is_integer() else _three(number)


def plural(number: int, noun: str) -> str:
    """ "1 spike", "2 spikes", "no spikes"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}" if number else f"no {noun}s"


def _three(number: float) -> str:
    whole = len(str(int(abs(number) + 0.5)))
    return f"{number:.{max(3 - whole, 0)}f}"
