"""Documents that cannot be used: the first one ends it, or all are left out, counted and listed."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from stem_jax.errors import BadRecord, InputError

ON_BAD = ("stop", "skip")
# Shown to a person; the file has them all.
_SHOWN = 5


class BadRecords:
    """Takes the bad records of a reading, in their order.

    count: how many were left out. first: some of them, as their messages.
    """

    def __init__(self, on_bad: str = "stop", file: Path | None = None):
        """on_bad: "stop" or "skip". file: gets a JSON line for each that is left out."""
        if on_bad not in ON_BAD:
            raise InputError(f"on_bad {on_bad!r} is unknown: use one of {', '.join(ON_BAD)}")
        self.count = 0
        self.first: list[str] = []
        self._skip = on_bad == "skip"
        self._path = file
        self._files = ExitStack()
        self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(self, error: BadRecord) -> None:
        """Counts it, or raises it."""
        if not self._skip:
            raise error
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(str(error))
        if self._path is not None:
            if self._file is None:
                self._file = self._files.enter_context(self._path.open("w", encoding="utf-8"))
            line = json.dumps({"place": error.place, "reason": str(error)}, ensure_ascii=False)
            self._file.write(line + "\n")
