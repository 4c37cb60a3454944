"""Records of runs that can be compared: one text, one number of tokens, pairs by seed."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from stem_jax.errors import InputError
from stem_jax.study.intervals import LEVEL, Interval, interval_of, paired

BASELINE = "dense"
# Runs that answer a question of their own and are no end of a variant.
_APART = ("rate", "length", "planted", "grid")
# What runs that are compared must share: places in the record.
_SHARED = (
    ("checksums", "text"),
    ("checksums", "tokenizer"),
    ("checksums", "test"),
    ("config", "train", "seq_len"),
    ("config", "train", "global_batch_size"),
)
Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Panel:
    """cells: records by the label of a variant and by seed, in order of both."""

    text: str
    tokens: int
    main: bool
    cells: Mapping[str, Mapping[int, Record]]

    def values(self, label: str, measure: str) -> dict[int, float | None]:
        """By seed; None of a run that diverged or does not have the measure."""
        return {
            seed: value_of(record, measure) for seed, record in self.cells.get(label, {}).items()
        }

    def difference(
        self, label: str, against: str, measure: str, level: float = LEVEL
    ) -> tuple[dict[int, float], Interval | None]:
        """Of two variants, paired by seed, with the interval of its mean."""
        found = paired(self.values(label, measure), self.values(against, measure))
        return found, interval_of(list(found.values()), level)

    def diverged(self, label: str) -> list[int]:
        """Seeds of runs that did not reach their end."""
        return [
            seed
            for seed, record in self.cells.get(label, {}).items()
            if record["diverged"] is not None
        ]

    def means(self, measure: str) -> list[float]:
        """Of each variant that has the measure, over its seeds."""
        by_label = ([*self.values(label, measure).values()] for label in self.cells)
        known = [[value for value in values if value is not None] for values in by_label]
        return [math.fsum(values) / len(values) for values in known if values]

    def measures(self) -> list[str]:
        """Names of all that any run has, in order."""
        records = (record for cell in self.cells.values() for record in cell.values())
        return sorted({name for record in records for name in record["measures"]})


def same_rates(panel: Panel) -> list[tuple[float, Panel]]:
    """The runs of a panel by rate, where dense and others have it; [] where all have one rate.

    A variant has its name as its label in each of them.
    """
    found: dict[float, dict[str, dict[int, Record]]] = {}
    for cell in panel.cells.values():
        for seed, record in cell.items():
            run = record["run"]
            found.setdefault(run["rate"], {}).setdefault(run["variant"], {})[seed] = record
    if len(found) < 2:
        return []
    return [
        (rate, Panel(panel.text, panel.tokens, panel.main, cells))
        for rate, cells in sorted(found.items())
        if BASELINE in cells and len(cells) > 1
    ]


def value_of(record: Record, measure: str) -> float | None:
    """Of a run's end; None where it has none: not measured, not finite, or diverged before."""
    value = record["measures"].get(measure)
    if record["diverged"] is not None or value is None or not math.isfinite(value):
        return None
    return float(value)


def panels_of(records: Iterable[Record]) -> list[Panel]:
    """All that can be compared, the study's main runs first.

    A variant has its name as its label. Where it was trained at several rates, runs at another
    rate than its main ones (or its first) have the rate behind it: "dense x3".

    Raises:
        InputError: runs of one panel differ in what they must share, or two of them are of the
            same variant, rate and seed.
    """
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in sorted(records, key=_order):
        run = record["run"]
        if run["purpose"] not in _APART:
            groups.setdefault((run["text"], run["tokens"]), []).append(record)
    panels = [_panel(*key, group) for key, group in groups.items()]
    # Sorting is stable: among the others, texts and tokens keep their order.
    return sorted(panels, key=lambda panel: not panel.main)


def of_purpose(records: Iterable[Record], purpose: str) -> list[Record]:
    """Runs made for one question, in a fixed order."""
    return sorted((r for r in records if r["run"]["purpose"] == purpose), key=_order)


def check_shared(records: Iterable[Record]) -> None:
    """Raises InputError if runs that are to be compared differ in text, tokenizer or batches."""
    first: Record | None = None
    for record in records:
        first = first or record
        for place in _SHARED:
            one, other = _at(first, place), _at(record, place)
            if one != other:
                raise InputError(
                    f"{first['name']} and {record['name']} differ in {'.'.join(place)} ({one} and "
                    f"{other}), which runs that are compared share; train one of them again"
                )


def _panel(text: str, tokens: int, records: list[Record]) -> Panel:
    check_shared(records)
    cells: dict[str, dict[int, Record]] = {}
    rates: dict[str, float] = {}
    for record in records:
        run = record["run"]
        rate = rates.setdefault(run["variant"], run["rate"])
        label = run["variant"] if run["rate"] == rate else f"{run['variant']} x{run['rate']:.3g}"
        cell = cells.setdefault(label, {})
        if run["seed"] in cell:
            raise InputError(
                f"{cell[run['seed']]['name']} and {record['name']} are the same variant, text, "
                "tokens, rate and seed; keep one of them"
            )
        cell[run["seed"]] = record
    ordered = {
        label: dict(sorted(cells[label].items())) for label in sorted(cells, key=_label_order)
    }
    return Panel(text, tokens, any(r["run"]["purpose"] == "main" for r in records), ordered)


def _label_order(label: str) -> tuple[bool, str]:
    return label != BASELINE, label


def _order(record: Record) -> tuple:
    run = record["run"]
    return (
        run["text"],
        run["tokens"],
        run["purpose"] != "main",
        run["variant"],
        run["rate"],
        run["seed"],
        record["name"],
    )


def _at(record: Record, place: tuple[str, ...]) -> Any:
    value: Any = record
    for key in place:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
