"""TensorBoard's files of a run, and what a start need not wait for."""

import struct
import subprocess
import sys

from stem_jax.training.event_file import EventFile


def _events(folder) -> list:
    """Records of the files there: a length, its checksum, an event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def test_scalars_stand_at_their_steps(tmp_path):
    folder = tmp_path / "events"
    events = EventFile(folder, 4)
    for step in (4, 5):
        events.write(step, {"train/loss": step / 2, "eval/loss": 7})
        values = [[(v.tag, v.simple_value) for v in e.summary.value] for e in _events(folder)]
        assert values[-1] == [("train/loss", step / 2), ("eval/loss", 7)]
    events.close()
    version, restart, *written = _events(folder)
    # By this a reader drops what an interrupted run wrote from this step on.
    assert (restart.session_log.status, restart.step) == (1, 4)
    assert version.file_version and [event.step for event in written] == [4, 5]


def test_a_start_imports_neither_torch_nor_matplotlib(tmp_path):
    """Each takes a second and more; tensorboardX takes torch along where it is installed."""
    program = f"""
import pathlib, sys
import stem_jax.run
from stem_jax.training.event_file import EventFile
EventFile(pathlib.Path({str(tmp_path)!r}) / "events", 1).close()
assert not {{"torch", "matplotlib"}} & set(sys.modules), "imported"
import torch
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
