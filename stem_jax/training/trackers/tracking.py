"""The trackers of a run: which ones there are, what they are told, and how it ends."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from stem_jax.config import Config, declared_keys
from stem_jax.errors import InputError
from stem_jax.processes.agreement import is_first
from stem_jax.processes.code_version import code_version
from stem_jax.processes.process_log import log
from stem_jax.training.trackers.mlflow_page import MlflowPage
from stem_jax.training.trackers.reporter import Reporter, picture, text
from stem_jax.training.trackers.tensorboard import TensorBoard
from stem_jax.training.trackers.tracker import FOLDER, Book, Course, Ending, Page, Tracker
from stem_jax.training.trackers.wandb_page import WandbPage

TRACKERS: dict[str, Callable[[Page], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandbPage,
    "mlflow": MlflowPage,
}


def check_trackers(config: Config) -> None:
    """Refuses, in the process that reports, what a tracker lacks.

    Raises:
        InputError: a name of no tracker, a package that is not installed, no server or no key.
    """
    tracking = config.tracking
    for name in tracking.trackers or ():
        if name not in TRACKERS:
            raise InputError(
                f"tracking.trackers={','.join(tracking.trackers or ())}: there is no {name}; "
                f"choose of {', '.join(TRACKERS)}, or none"
            )
        check = getattr(TRACKERS[name], "check", None)
        if check is not None and is_first():
            check(tracking.offline, tracking.mlflow_uri)


class Tracking:
    """What process 0 tells the trackers of a run. Use it as a context; leaving it ends their pages.

    Attributes:
        ending: how it ends, if by no error.
    """

    def __init__(self, workdir: Path):
        self.ending = Ending.STOPPED
        self._workdir = workdir
        self._reporters: dict[str, Reporter] = {}
        self._timeout, self._began, self._steps = 0.0, 0.0, 0

    def begin(self, config: Config, start: int) -> None:
        """Opens the pages. start: the step that this start goes on from."""
        if is_first():
            self._open(config, start, config.tracking.trackers or ())

    def catch_up(self, config: Config, step: int) -> bool:
        """Opens the pages that lack something of a complete run, whose last step is given, and
        returns whether there are any; as in `begin`, its records are to follow."""
        told = self._ends.read()
        missing = [n for n in config.tracking.trackers or () if told.get(n) != step]
        if not missing or not is_first():
            return False
        log.info(f"telling {', '.join(missing)} what an earlier start could not")
        self._open(config, step, missing)
        self._began, self.ending = 0.0, Ending.COMPLETE
        return True

    @property
    def _ends(self) -> Book:
        """By tracker, the last step of a complete run of which it has all."""
        return Book(self._workdir / FOLDER, "ends")

    def _open(self, config: Config, start: int, names: Sequence[str]) -> None:
        tracking = config.tracking
        page = Page(
            workdir=self._workdir,
            config={key: _plain(config.value_of(key)) for key in declared_keys()},
            facts={"code.stem_jax": code_version(), "code.jax": jax.__version__},
            start=start,
            project=tracking.project,
            name=tracking.name or self._workdir.absolute().name,
            offline=tracking.offline,
            server=tracking.mlflow_uri,
            timeout=tracking.timeout,
        )
        self._timeout, self._began = tracking.timeout, time.time()
        self._steps = config.train.steps
        for name in names:
            self._reporters[name] = Reporter(name, TRACKERS[name](page))

    def follow(self, course: Course) -> None:
        """Says what there is to report."""
        for reporter in self._reporters.values():
            reporter.follow(course)

    def wake(self) -> None:
        """There are more records."""
        for reporter in self._reporters.values():
            reporter.wake()

    def add_text(self, name: str, content: str) -> None:
        """Shows a text."""
        for reporter in self._reporters.values():
            reporter.add(text(name, content))

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        """Ends the pages, with the pictures of the run's folder, in `tracking.timeout` at most."""
        drawn = [p for p in self._workdir.glob("*.png") if p.stat().st_mtime >= self._began]
        for reporter in self._reporters.values():
            for path in sorted(drawn):
                reporter.add(picture(path))
            reporter.end(self.ending if kind is None else Ending.FAILED)
        deadline = time.monotonic() + self._timeout
        told = {
            name: self._steps
            for name, reporter in self._reporters.items()
            if reporter.wait(max(0.0, deadline - time.monotonic()))
        }
        if told and kind is None and self.ending is Ending.COMPLETE:
            self._ends.write(**self._ends.read() | told)


def _plain(value: Any) -> Any:
    """As JSON has it: trackers know no tuples."""
    return json.loads(json.dumps(value))
