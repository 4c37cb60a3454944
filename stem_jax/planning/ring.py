"""What each device of a ring sends, and how much of that leaves its slice or host."""

import collections


def sent_bytes(kind: str, read: int, size: int) -> float:
    """Bytes that a device sends in a collective among `size`, of which it reads so many bytes."""
    share = (size - 1) / size
    sent = {
        "all-to-all": read * share,
        "all-gather": read * (size - 1),
        "reduce-scatter": read * share,
        "all-reduce": 2 * read * share,
    }
    return sent.get(kind.removeprefix("ragged-"), read)


def crossing_share(kind: str, slices: list[int]) -> float:
    """The share of those bytes that goes from slice to slice.

    Rings pass through all devices of a slice before they leave it, as many rings as it has devices,
    each leaving from another one. In an exchange every device sends to every other.

    Args:
        slices: of the devices of one group.
    """
    beside = max(collections.Counter(slices).values())
    if beside == len(slices):
        return 0.0
    if kind.endswith("all-to-all"):
        return (len(slices) - beside) / (len(slices) - 1)
    return 1.0 if kind == "collective-permute" else 1 / beside
