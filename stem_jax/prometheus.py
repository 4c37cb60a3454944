"""Prometheus' text format."""

from collections.abc import Iterable, Mapping

_PREFIX = "stem_"
_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
Samples = Iterable[tuple[Mapping[str, str], float]]


def metric(name: str, kind: str, said: str, labelled: Samples) -> list[str]:
    """The lines of a metric: what it is, and a value for each set of labels.

    Args:
        name: without the prefix of this package.
        kind: counter, gauge or summary.
    """
    head = [f"# HELP {_PREFIX}{name} {said}", f"# TYPE {_PREFIX}{name} {kind}"]
    return head + samples(name, labelled)


def samples(name: str, labelled: Samples) -> list[str]:
    """Values alone."""
    lines = []
    for labels, value in labelled:
        listed = ",".join(f'{key}="{text.translate(_ESCAPES)}"' for key, text in labels.items())
        lines.append(f"{_PREFIX}{name}{f'{{{listed}}}' if listed else ''} {value}")
    return lines
