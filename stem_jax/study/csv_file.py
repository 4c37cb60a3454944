"""The measures of all runs as a CSV file, for spreadsheets and other programs."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from stem_jax.files import write_whole
from stem_jax.study.measured import measure_of
from stem_jax.study.panels import Record

_RUN = ("study", "purpose", "text", "variant", "tokens", "rate", "seed")
COLUMNS = ("name", *_RUN, "commit", "diverged", "measure", "unit", "value")


def csv_text(records: Sequence[Record]) -> str:
    """One line for each run and measure, in order of names; a run without measures has one line.

    `diverged` is the step, empty where the run ended as it should.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for record in sorted(records, key=lambda record: record["name"]):
        diverged = "" if record["diverged"] is None else record["diverged"]
        begin = [record["name"], *(record["run"][key] for key in _RUN), record["commit"], diverged]
        for measure, value in sorted(record["measures"].items()) or [("", "")]:
            unit = measure_of(measure).unit if measure else ""
            writer.writerow([*begin, measure, unit, value])
    return text.getvalue()


def write_csv(records: Sequence[Record], path: Path) -> None:
    """Writes `csv_text`.

    Raises:
        InputError: the file cannot be written.
    """
    write_whole(path, csv_text(records))
