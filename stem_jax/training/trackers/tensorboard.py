"""A run's numbers, texts and pictures as TensorBoard reads them."""

import contextlib
import math
import struct
import sys
import time
from pathlib import Path
from typing import Any

from stem_jax.training.trackers.tracker import Book, Ending, Page, Row


class TensorBoard:
    """Event files in the run's folder `tensorboard`, which have what they took when a call returns.

    tensorboardX's SummaryWriter writes in a thread; when that dies of a full disk, its queue fills
    up and whoever writes waits for ever.
    """

    def __init__(self, page: Page):
        self._folder = page.workdir / "tensorboard"
        self._most: float = page.start
        self._book = Book(page.folder, "tensorboard")
        self._writer: Any = None

    def begin(self) -> int:
        """Opens a new file, which hides what others have from the first step to be written on."""
        with _without("torch"):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2, tensor_pb2
        self._event, self._summary = event_pb2.Event, summary_pb2
        self._tensor = tensor_pb2.TensorProto
        # Steps that this start makes again come in place of those of an earlier one.
        self._last = min(self._book.read().get("last", 0), self._most)
        # After an error it goes on where it was.
        self._most = math.inf
        if self._writer is not None:
            self._writer.close()
        self._folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(self._folder / "events"))
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(self._event(step=self._last + 1, session_log=restart))
        return self._last

    def renew(self) -> None:
        """Nothing: what is taken back is hidden."""

    def write(self, rows: list[Row]) -> None:
        """Adds scalars of steps."""
        for row in rows:
            scalars = [
                self._summary.Summary.Value(tag=key, simple_value=value)
                for key, value in row.values.items()
            ]
            self._add(row.step, row.seconds, scalars)
        self._writer.flush()
        self._last = rows[-1].step
        self._book.write(last=self._last)

    def write_text(self, name: str, text: str) -> None:
        """Adds a text, at the last step."""
        shape = {"dim": [{"size": 1}]}
        tensor = self._tensor(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=shape)
        kind = {"plugin_data": {"plugin_name": "text"}}
        value = self._summary.Summary.Value(
            tag=f"{name}/text_summary", tensor=tensor, metadata=kind
        )
        self._add(self._last, time.time(), [value])
        self._writer.flush()

    def write_picture(self, path: Path) -> None:
        """Adds a picture, at the last step."""
        data = path.read_bytes()
        # Where the header of a PNG has them.
        width, height = struct.unpack(">II", data[16:24])
        image = {"height": height, "width": width, "colorspace": 4, "encoded_image_string": data}
        self._add(
            self._last, time.time(), [self._summary.Summary.Value(tag=path.stem, image=image)]
        )
        self._writer.flush()

    def close(self, ending: Ending) -> None:
        """Nothing can be written any more."""
        self._writer.close()

    def _add(self, step: int, seconds: float, values: list) -> None:
        summary = self._summary.Summary(value=values)
        self._writer.write_event(self._event(step=step, wall_time=seconds, summary=summary))


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
