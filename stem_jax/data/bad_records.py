"""Documents that cannot be used: the first one ends it, or all are left out, counted and listed."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Self

from stem_jax.errors import BadRecord, InputError

ON_BAD = ("stop", "skip")


class BadRecords:
    """Takes the bad records of a reading, in their order.

    count: how many were left out. first: the reason of the first of them. stops: none is.
    """

    def __init__(self, on_bad: str = "stop", file: Path | None = None, *, way_out: str = ""):
        """on_bad: "stop" or "skip". file: gets a JSON line for each that is left out.

        way_out: what leaves them out, for the message of the one that stops it.
        """
        if on_bad not in ON_BAD:
            raise InputError(f"on_bad {on_bad!r} is unknown: use one of {', '.join(ON_BAD)}")
        self.count = 0
        self.first = ""
        self.stops = on_bad == "stop"
        self._way_out = way_out
        self._path = file
        if file is not None:
            file.unlink(missing_ok=True)  # of an earlier attempt
        self._files = ExitStack()
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def told(self) -> str:
        """What an error says of them behind its own words; "" if there are none."""
        return f"; records left out: {self.count:,}, first: {self.first}" if self.count else ""

    def close(self) -> None:
        """The file is whole when it returns."""
        self._files.close()

    def add(self, error: BadRecord) -> None:
        """Counts it, or raises it."""
        if self.stops and self._way_out:
            raise BadRecord(f"{error}; {self._way_out}", error.place) from error
        if self.stops:
            raise error
        self.count += 1
        self.first = self.first or str(error)
        if self._path is not None:
            if self._file is None:
                self._file = self._files.enter_context(self._path.open("w", encoding="utf-8"))
            line = json.dumps({"place": error.place, "reason": str(error)}, ensure_ascii=False)
            self._file.write(line + "\n")
