"""The files of a checkpoint: a list written with it, and what is missing later.

Values on disk carry no checksums that would tell a truncated file from a whole one before it is
read, and reading is too late: by then other processes wait for this one.
"""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

from stem_jax.config import MEMORY_SECTIONS
from stem_jax.errors import InputError
from stem_jax.files import read_json, write_whole
from stem_jax.memory.memory import STEM, prefix
from stem_jax.tables import row_folder
from stem_jax.tables.saved_disk import SavedDisk

# What is written, and what is read.
FORMAT_VERSION = 3
FORMATS = (2, FORMAT_VERSION)
# The metric that decides which checkpoint is the best.
BEST = "eval/loss"
PLAIN_ITEMS = ("data", "config", "layout")
ITEMS = ("params", "opt_state", *PLAIN_ITEMS)
FOLDER = "checkpoints"
LIST = "files.json"
ASIDE = "damaged_checkpoints"
# Orbax adds the time of the commit to it afterwards.
_GROWS = "_CHECKPOINT_METADATA"
# What Orbax calls the file of a plain item.
_JSON = "metadata"


def check_outside(path: str | Path, flag: str) -> None:
    """Keeps other results out of the checkpoints of a run, where they would count as damaged ones.

    Raises:
        InputError: the path lies among checkpoints.
    """
    for folder in Path(os.path.realpath(path)).parents:
        if folder.name == FOLDER and (folder.parent / "config.json").is_file():
            raise InputError(
                f"{flag}={path} is among the checkpoints of {folder.parent}, which could not be "
                "read any more; choose another place"
            )


def table_items(name: str) -> tuple[str, str]:
    """The items of a memory's rows, and of what their optimizer keeps."""
    return f"{prefix(name)}_rows", f"{prefix(name)}_{'slots' if name == STEM else 'moments'}"


def write_list(folder: Path) -> None:
    """Writes the names and sizes of all files of a checkpoint beside them."""
    sizes = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / LIST).write_text(json.dumps(sizes, indent=0))


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if nothing is.

    One without a list, as earlier versions wrote them, is whole if it has its items.
    """
    if not (folder / LIST).exists():
        return _missing_items(folder)
    sizes = _plain(folder / LIST)
    if sizes is None:
        return f"{LIST} is not readable"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if name != _GROWS and path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    return _damaged_rows(folder)


def _damaged_rows(folder: Path) -> str | None:
    """What is wrong with rows that a checkpoint has on disk, where this machine has that disk."""
    layout = _plain(folder / "layout" / _JSON) or {}
    for name, record in layout.items():
        if not name.endswith("_disk"):
            continue
        saved = SavedDisk.from_record(record)
        for block in saved.blocks:
            of_block = block.folder(saved.folder)
            if of_block.is_dir() and (reason := row_folder.damage(of_block, saved.name)):
                return reason
    return None


def check_format(folder: Path, version: int) -> None:
    """Raises InputError for a checkpoint of another format, `version`, than this code reads."""
    if version not in FORMATS:
        age = "an older" if version < FORMAT_VERSION else "a newer"
        known = " and ".join(map(str, FORMATS))
        raise InputError(
            f"checkpoint {folder} has format {version}, this version reads {known}; it was written "
            f"by {age} stem_jax, use that"
        )


def set_aside_damaged(checkpoints: Path) -> list[str]:
    """Moves damaged checkpoints that are newer than the newest whole one out of the way.

    Returns a line for each. Raises InputError if no whole one is left, if one cannot be moved, and
    for one of another format: what is whole there, only its own version knows.
    """
    steps = sorted(
        (int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal()), reverse=True
    )
    found: list[tuple[int, str]] = []
    for step in steps:
        folder = checkpoints / str(step)
        layout = _plain(folder / "layout" / _JSON)
        if layout is not None and isinstance(layout.get("format"), int):
            check_format(folder, layout["format"])
        reason = damage(folder)
        if reason is None:
            break
        found.append((step, reason))
    if found and len(found) == len(steps):
        raise InputError(
            f"no checkpoint in {checkpoints} is whole (the newest, {found[0][0]}: {found[0][1]}); "
            "bring its files back, or start in another --workdir"
        )
    lines = []
    for step, reason in found:
        folder, target = checkpoints / str(step), checkpoints.parent / ASIDE / str(step)
        try:
            _move(folder, target)
        except OSError as error:
            raise InputError(
                f"checkpoint {folder} is damaged ({reason}) and cannot be moved to {target} "
                f"({error.strerror or error}); move or delete it to go on from the one before"
            ) from error
        lines.append(f"checkpoint {step} is damaged ({reason}); moved to {target}")
    return lines


def _missing_items(folder: Path) -> str | None:
    """Which items a checkpoint without a list lacks; None if none."""
    config = _plain(folder / "config" / _JSON) or {}

    def value_of(section: str, key: str):
        values = config.get(section)
        return values.get(key) if isinstance(values, dict) else None

    readers = {STEM: ("model", "stem_layers")} | {n: (n, "layers") for n in MEMORY_SECTIONS}
    # Written as a list, by earlier versions also where there is none.
    memories = [n for n, key in readers.items() if value_of(*key) not in (None, "none", [])]
    # Of rows that stay as they are, nothing else is kept.
    kept = 1 if value_of("optimizer", "train") == "backbone" else 2
    wanted = (*ITEMS, *(item for name in memories for item in table_items(name)[:kept]))
    missing = [name for name in wanted if not any((folder / name).glob("*"))]
    if len(missing) == len(ITEMS) == len(wanted):
        return f"without {LIST} and any item"
    return f"without {LIST} and {', '.join(missing)}" if missing else None


def _plain(path: Path) -> dict | None:
    """The object in a JSON file; None without such a file, or if it holds anything else."""
    with contextlib.suppress(InputError):
        found = read_json(path)
        return found if isinstance(found, dict) else None
    return None


def _move(folder: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    try:
        folder.rename(target)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    # The checkpoints lie behind a link, on another file system.
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        shutil.copytree(folder, part)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(folder)


def write_loss(folder: Path, loss: float) -> None:
    """Puts the validation loss where Orbax reads it when it opens the folder again.

    It would write it itself if it chose the best one by a function of its options, and then warns
    of every checkpoint that has none.
    """
    write_whole(folder / "metrics" / "metrics", json.dumps({BEST: loss}))
