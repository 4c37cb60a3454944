"""What trackers have in common: what they are told of a run, and what they keep in its folder."""

import enum
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from stem_jax.files import read_json, write_whole

FOLDER = "tracking"


class Row(NamedTuple):
    """All that a run recorded of a step. seconds: when it was read, since 1970."""

    step: int
    seconds: float
    values: dict[str, float]


@dataclass(frozen=True)
class Course:
    """What there is to report of a run.

    Attributes:
        records: those of the run, which grow; the steps do not fall.
        awaits: whether a validation is to come for a step.
        taken_back: losses of steps that an earlier start made, and that are made again; None if
            they were not finite.
    """

    records: Sequence[Mapping[str, Any]] = ()
    awaits: Callable[[int], bool] = lambda step: False
    taken_back: Mapping[int, float | None] = field(default_factory=dict)


class Ending(enum.Enum):
    """How a start of a run ended."""

    COMPLETE = enum.auto()
    STOPPED = enum.auto()
    FAILED = enum.auto()


@dataclass(frozen=True)
class Page:
    """What a run is shown as.

    Attributes:
        workdir: the run's folder; trackers keep their files in its folder FOLDER.
        config: the configuration, by "section.key".
        facts: of the code that runs, by name.
        start: the step that this start goes on from.
        project: of several runs. name: of this one.
        offline: keep everything in files.
        server: address; None where the tracker finds it itself.
        timeout: seconds that the end of a run may take.
    """

    workdir: Path
    config: dict[str, Any]
    facts: dict[str, str]
    start: int
    project: str
    name: str
    offline: bool
    server: str | None
    timeout: float

    @property
    def folder(self) -> Path:
        """Of the trackers' own files."""
        return self.workdir / FOLDER


class Tracker(Protocol):
    """A place that shows a run. Each is called by one thread; any call may raise or take long.

    What was written is never written again: a later start, and this one after an error, asks
    `begin` which step was the last to arrive.
    """

    def begin(self) -> int:
        """Opens the run's page, or finds it again; returns the last step that it has, 0 for none.

        After an error it is called again.
        """

    def renew(self) -> None:
        """The next `begin` opens another page: the one there is has steps that were taken back."""

    def write(self, rows: list[Row]) -> None:
        """Adds steps, in their order, each once."""

    def write_text(self, name: str, text: str) -> None:
        """Shows a text, in place of an earlier one by that name."""

    def write_picture(self, path: Path) -> None:
        """Shows a PNG file, in place of an earlier one by that name."""

    def close(self, ending: Ending) -> None:
        """All has been written."""


class Book:
    """What a tracker has to know at the next start of a run: a small file in the run's folder."""

    def __init__(self, folder: Path, name: str):
        """folder: that of the trackers' own files."""
        self._path = folder / f"{name}.json"

    def read(self) -> dict[str, Any]:
        """What was written last; {} if nothing was."""
        return read_json(self._path) if self._path.exists() else {}

    def write(self, **values: Any) -> None:
        """Replaces all of it."""
        write_whole(self._path, json.dumps(values) + "\n")
