"""A run's numbers as TensorBoard reads them."""

import contextlib
import sys
import time
from pathlib import Path


class EventFile:
    """A file of scalars; what it takes is on the disk when a call returns.

    tensorboardX's SummaryWriter writes in a thread; when that dies of a full disk, its queue fills
    up and the loop would wait for ever.
    """

    def __init__(self, folder: Path, first_step: int):
        """first_step: hides what an interrupted run wrote from there on."""
        with _without("torch"):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.proto.summary_pb2 import Summary
        self._event, self._summary = Event, Summary
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        restart = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(step=first_step, session_log=restart))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds scalars of a step."""
        scalars = [self._summary.Value(tag=key, simple_value=v) for key, v in values.items()]
        summary = self._summary(value=scalars)
        self._writer.write_event(self._event(step=step, wall_time=time.time(), summary=summary))
        self._writer.flush()

    def close(self) -> None:
        """Nothing can be written any more."""
        self._writer.close()


@contextlib.contextmanager
def _without(module: str):
    """What is imported inside does not find a module that nobody has imported before.

    tensorboardX looks for torch, which takes a second and more to come, and is not needed here.
    """
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # as the import system has it
    try:
        yield
    finally:
        del sys.modules[module]
