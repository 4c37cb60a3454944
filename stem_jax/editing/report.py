"""Measured edits as rows of figures, as a table for people, and as CSV with a line for each."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from stem_jax.editing.fluency import Fluency
from stem_jax.editing.measurement import NOT_READ, EditOutcome

_SHARED = ("preferred", "paraphrase", "locality", "specificity")
COLUMNS = ("relation", "edits", "right before", "new", "old", "other", *_SHARED, NOT_READ)
_CSV = ("relation", "subject", "donor", "prompt", "old", "new", "right_before", "answer", *_SHARED)


def summarize(outcomes: Sequence[EditOutcome]) -> list[list[Any]]:
    """A row of COLUMNS for each relation, and one for all if there are several; shares in percent.

    new, old, other: what is answered after the edit. preferred: new likelier than old. paraphrase:
    new in other words. locality, specificity: answers about other subjects and other relations of
    the subject that stay; None where nothing was asked. not read: a number, of edits whose prompt
    reads no row that was written; these are in none of the other columns but the first two and the
    last, and questions that read none are in none.
    """
    relations = list(dict.fromkeys(outcome.case.relation for outcome in outcomes))
    groups = [(name, [x for x in outcomes if x.case.relation == name]) for name in relations]
    if len(groups) > 1:
        groups.append(("all", list(outcomes)))
    return [
        [
            name,
            len(group),
            _percent(x.base for x in read),
            *(_percent(x.answer == answer for x in read) for answer in ("new", "old", "other")),
            _percent(x.preferred for x in read),
            _percent(y for x in group for y in x.paraphrases),
            _percent(y for x in group for y in x.locality),
            _percent(y for x in group for y in x.specificity),
            len(group) - len(read),
        ]
        for name, group in groups
        for read in [[x for x in group if x.answer != NOT_READ]]
    ]


def format_summary(rows: Sequence[Sequence[Any]]) -> str:
    """The rows of `summarize` as a table for a terminal."""
    widths = [max(len(name), 6) for name in COLUMNS]
    widths[0] = max(len(str(row[0])) for row in [COLUMNS, *rows])
    lines = ["  ".join([COLUMNS[0].ljust(widths[0]), *map(str.rjust, COLUMNS[1:], widths[1:])])]
    for row in rows:
        cells = ["-" if x is None else f"{x:.1f}" if isinstance(x, float) else str(x) for x in row]
        lines.append("  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]))
    return "\n".join(lines)


def format_fluency(found: Fluency) -> str:
    """A line for people."""
    return (
        f"fluency: n-gram entropy {found.before:.2f} bits before, {found.after:.2f} after, mean of "
        f"{found.edits} edits"
    )


def format_csv(outcomes: Sequence[EditOutcome]) -> str:
    """A line for each edit, under a header; shares in percent."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(_CSV)
    writer.writerows(map(_line, outcomes))
    return text.getvalue()


def _line(outcome: EditOutcome) -> list[Any]:
    case = outcome.case
    named = [case.relation, case.subject, case.donor, case.prompt, case.old, case.new]
    shares = [_percent(x) for x in (outcome.paraphrases, outcome.locality, outcome.specificity)]
    preferred = None if outcome.preferred is None else int(outcome.preferred)
    return [*named, int(outcome.base), outcome.answer, preferred, *shares]


def _percent(found: Iterable[bool | None]) -> float | None:
    values = [bool(value) for value in found]
    return round(100 * sum(values) / len(values), 2) if values else None
