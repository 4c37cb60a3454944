"""What Weights & Biases keeps of a run on this machine, read back."""

import struct
from collections.abc import Iterator
from pathlib import Path

# As wandb/core/internal/transactionlog writes it: a header, then blocks as those of LevelDB's log.
_HEADER, _BLOCK = 7, 32768
_WHOLE, _FIRST, _LAST = 1, 2, 4


def last_step(folder: Path, run_id: str) -> int:
    """The last step in a run's newest file that has one, 0 for none.

    What a process that was killed had not put on the disk is not in it.

    Args:
        folder: that holds wandb's own, `wandb`.
    """
    # Made when it is imported, which mypy does not see.
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    # Names begin with the time of the start.
    for path in sorted(folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb"), reverse=True):
        steps = (
            record.history.step.num
            for record in map(Record.FromString, _records(path.read_bytes()))
            if record.HasField("history")
        )
        if last := max(steps, default=0):
            return last
    return 0


def _records(data: bytes) -> Iterator[bytes]:
    """The whole records of a file, which may end in the midst of one."""
    place, parts = _HEADER, b""
    while place + _HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        end = place + _HEADER + size
        if kind == 0 or end > len(data):
            return
        part = data[place + _HEADER : end]
        parts = part if kind in (_WHOLE, _FIRST) else parts + part
        if kind in (_WHOLE, _LAST):
            yield parts
        place = end
