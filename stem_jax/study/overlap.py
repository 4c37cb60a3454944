"""The headline on test documents that have least in common with the text of training."""

import math
from collections.abc import Sequence
from typing import Any

from stem_jax.errors import InputError
from stem_jax.study.intervals import interval_of, paired
from stem_jax.study.panels import BASELINE, Panel, Record


def low_overlap(panel: Panel, overlaps: Sequence[float]) -> dict[str, Any]:
    """The headline on the half of the test documents of which training holds least.

    Raises:
        InputError: a run's documents are not as many as the overlaps.
    """
    order = sorted(range(len(overlaps)), key=lambda place: (overlaps[place], place))
    kept = sorted(order[: len(overlaps) // 2])
    values = {
        label: {seed: _bits(record, kept, len(overlaps)) for seed, record in cell.items()}
        for label, cell in panel.cells.items()
    }
    variants = []
    for label, by_seed in values.items():
        differences = paired(by_seed, values.get(BASELINE, {}))
        interval = interval_of(list(differences.values()))
        variants.append(
            {
                "variant": label,
                "mean": _mean([x for x in by_seed.values() if x is not None]),
                "difference": interval.to_dict() if interval and label != BASELINE else None,
            }
        )
    return {
        "documents": len(kept),
        "of": len(overlaps),
        "overlap": _mean([overlaps[place] for place in kept]),
        "overlap_of_all": _mean(overlaps),
        "variants": variants,
    }


def _bits(record: Record, kept: Sequence[int], count: int) -> float | None:
    documents = record["documents"]
    if record["diverged"] is not None or not documents or not documents["nats"]:
        return None
    if len(documents["nats"]) != count:
        raise InputError(
            f"{record['name']} has {len(documents['nats'])} test documents and the text {count}; "
            "take the text that the run was trained on"
        )
    size = sum(documents["bytes"][place] for place in kept)
    nats = math.fsum(documents["nats"][place] for place in kept)
    return nats / math.log(2) / size if size and math.isfinite(nats) else None


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
