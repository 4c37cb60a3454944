"""Tables that measurements of edits left in a work folder, for the page of an analysis.

A file `WORKDIR/editing/*.json` holds {"title": text, "columns": [text], "rows": [[cell]]} and may
hold "note", a text, and "run", the fingerprint of the checkpoint.
"""

import dataclasses
from pathlib import Path
from typing import Any

from stem_jax.errors import InputError
from stem_jax.files import read_json

FOLDER = "editing"


@dataclasses.dataclass(frozen=True)
class EditTable:
    """title, note: texts; the latter may be empty. columns: [m] texts. rows: m cells each. run:
    fingerprint of the checkpoint that was edited, if it is known."""

    title: str
    columns: list[str]
    rows: list[list[Any]]
    note: str = ""
    run: str = ""

    def seen_from(self, run: str) -> "EditTable":
        """The table for readers of a checkpoint: the note says if it is of another one."""
        if self.run in ("", run):
            return self
        note = "; ".join(filter(None, ["measured on another checkpoint", self.note]))
        return dataclasses.replace(self, note=note)


def read_edit_tables(workdir: str | Path) -> list[EditTable]:
    """The tables of a work folder, by the names of their files; none without the folder.

    Raises:
        InputError: a file that cannot be read, or that holds something else.
    """
    return [_read(path) for path in sorted((Path(workdir) / FOLDER).glob("*.json"))]


def _read(path: Path) -> EditTable:
    # Figures of ours may be NaN.
    record = read_json(path, remedy="remove it, or write it anew", constants=True)
    names = {field.name for field in dataclasses.fields(EditTable)}
    known = record if isinstance(record, dict) else {}
    table = {name: known[name] for name in names if name in known}
    columns, rows = table.get("columns"), table.get("rows")
    fits = (
        isinstance(table.get("title"), str)
        and isinstance(table.get("note", ""), str)
        and isinstance(table.get("run", ""), str)
        and isinstance(columns, list)
        and isinstance(rows, list)
        and all(isinstance(row, list) and len(row) == len(columns) for row in rows)
    )
    if not fits:
        raise InputError(
            f"{path} is no table of an edit: title, columns and rows of as many cells are needed; "
            "remove it, or write it anew"
        )
    return EditTable(**table)
