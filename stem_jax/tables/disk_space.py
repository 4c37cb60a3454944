"""What rows on disk take, and the refusals when that is too much."""

import errno
import shutil
from pathlib import Path

from stem_jax.errors import InputError
from stem_jax.tables.saved_rows import ROW_BYTES

# Besides what grows with the rows: the live index, room that files have beforehand, a save that is
# written before an older one goes.
SLACK_BYTES = 2**30
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_GIB = 2**30
_REMEDY = "free some, keep fewer checkpoints, or give tables.disk a folder of a larger disk"


def needed_bytes(record_bytes: int, rows: int, saves: int) -> int:
    """Bytes that the rows of a block take at most, without the slack that a disk has once.

    Args:
        record_bytes: of a record, see `RowRecord.size`.
        rows: that will be written.
        saves: kept at a time.
    """
    return rows * (1 + saves) * (record_bytes + ROW_BYTES)


def free_bytes(folder: Path) -> int:
    """Bytes that can be written to the disk of a folder, which may not exist yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def check_disk(folder: Path, needed: int, taken: int = 0) -> None:
    """Refuses rows that do not fit, before any is written.

    Args:
        folder: where they will lie.
        needed: from `needed_bytes`, of all blocks; there is a GiB of slack, too.
        taken: bytes of it that rows in the folder take already.

    Raises:
        InputError: the figures and the remedies.
    """
    needed += SLACK_BYTES
    if (free := free_bytes(folder)) < needed - taken:
        raise InputError(
            f"tables.disk={folder}: rows on disk may come to {needed / _GIB:.2f} GiB, "
            f"{taken / _GIB:.2f} GiB are there and {free / _GIB:.2f} GiB are free; {_REMEDY}"
        )


def full_disk(folder: Path, taken: int, wanted: int, reason: str) -> InputError:
    """Of a write that found no room.

    Args:
        folder: of the rows.
        taken: bytes of what is in it.
        wanted: bytes that were to be written.
        reason: the system's, or which bound it was.
    """
    return InputError(
        f"tables.disk: {folder} cannot take {wanted / 2**20:.1f} MiB more ({reason}): it has "
        f"{taken / _GIB:.2f} GiB, {free_bytes(folder) / _GIB:.2f} GiB are free; {_REMEDY}; what "
        "was saved stays usable"
    )
