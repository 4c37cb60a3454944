"""What a process wrote of one of its starts: a line of its file, rewritten in place.

So the file stays as small as there are starts, and whoever is killed leaves what it wrote last: one
short write, which a kill does not divide.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, Self

FOLDER = "goodput"
# Of a line, with blanks up to its end.
_WIDTH = 1536
_LONGEST_END = 300
COMPLETE, STOPPED, FAILED = "complete", "stopped", "failed"


def record_path(workdir: Path, process: int) -> Path:
    """The file of a process."""
    return workdir / FOLDER / f"process_{process:03d}.jsonl"


@dataclasses.dataclass
class StartRecord:
    """A start of a process, as it was at its last record.

    process: of processes. host, pid, boot: where; boot names the time since the machine started.
    began_clock: the start of the process by that machine's monotonic clock, began_time: by the
    clock of the wall, in seconds. seconds: from there to the record, which parts sum up to.
    first_step, step: the first and the last step that it made; None, and the step that it began
    after. steps: of the run. loss: of the step. tokens: of its steps. step_seconds: of the last
    step; usual_step_seconds: of the last ones, without the first. doing: the part under way.
    saved_step, saved_time: its last save that is on the disk, and when. end: None while it runs
    and if it was killed, else how it ended; why: of one that failed.
    """

    process: int
    processes: int
    host: str
    pid: int
    boot: str
    began_clock: float
    began_time: float
    steps: int = 0
    step: int = 0
    seconds: float = 0.0
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    first_step: int | None = None
    loss: float | None = None
    tokens: int = 0
    step_seconds: float | None = None
    usual_step_seconds: float | None = None
    doing: str | None = None
    saved_step: int | None = None
    saved_time: float | None = None
    end: str | None = None
    why: str | None = None

    @property
    def steps_made(self) -> int:
        """Steps of this start."""
        return 0 if self.first_step is None else self.step - self.first_step + 1

    @property
    def until_clock(self) -> float:
        """When it was written, by the monotonic clock of its machine."""
        return self.began_clock + self.seconds

    @property
    def time(self) -> float:
        """When it was written, by the clock of its host's wall at its beginning."""
        return self.began_time + self.seconds

    def seconds_until(self, later: "StartRecord") -> float:
        """From its last record to the beginning of a later start; negative if clocks differ."""
        if later.boot == self.boot and self.boot:
            return later.began_clock - self.until_clock
        return later.began_time - self.time

    def line(self) -> str:
        """JSON in a line of its own."""
        values = dict(vars(self))
        values["parts"] = {name: round(seconds, 4) for name, seconds in self.parts.items()}
        for name, value in values.items():
            if isinstance(value, float):
                values[name] = round(value, 6) if math.isfinite(value) else None
        if self.loss is not None and math.isfinite(self.loss):
            values["loss"] = self.loss
        if self.why is not None:
            values["why"] = self.why[:_LONGEST_END]
        return json.dumps(values)

    @classmethod
    def parsed(cls, values: dict[str, Any]) -> Self:
        """Of a line; what a later version added is left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def boot() -> str:
    """Names the time since this machine started, its monotonic clock's; "" where none tells."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class RecordFile:
    """The line of a start that runs, at the end of its process's file."""

    def __init__(self, path: Path):
        """Makes the file, if there is none. Raises OSError where it cannot be written."""
        path.parent.mkdir(exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._place = os.lseek(self._file, 0, os.SEEK_END)
        if self._place and os.pread(self._file, 1, self._place - 1) != b"\n":
            # A machine that crashed may leave half a line.
            self._place += os.pwrite(self._file, b"\n", self._place)

    def write(self, record: StartRecord) -> None:
        """Takes the place of what it wrote before."""
        text = record.line().encode().ljust(_WIDTH - 1) + b"\n"
        assert len(text) == _WIDTH, text
        os.pwrite(self._file, text, self._place)

    def remove(self) -> None:
        """As if there had been no such start."""
        os.ftruncate(self._file, self._place)

    def close(self) -> None:
        """What was written stays."""
        os.close(self._file)


def read_starts(path: Path) -> list[StartRecord]:
    """The starts of a process, oldest first; none without its file. Lines cut off are left out."""
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(StartRecord.parsed(json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            # A machine that crashed may leave anything.
            continue
    return found


def read_processes(workdir: Path) -> list[list[StartRecord]]:
    """The starts of every process of a run that ever was, in the order of processes."""
    folder = workdir / FOLDER
    paths = sorted(folder.glob("process_*.jsonl")) if folder.is_dir() else []
    return [starts for path in paths if (starts := read_starts(path))]
