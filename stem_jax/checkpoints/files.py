"""The files of a checkpoint, looked at before any is read: what is missing, cut or damaged.

What Orbax reads has no checksums of its own, and reading is too late: by then other processes wait
for this one.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from stem_jax.bucket import is_folder, move_folder, put, stored_size
from stem_jax.bucket_errors import bucket_errors
from stem_jax.checkpoints.chain import base_damage
from stem_jax.checkpoints.file_list import LIST, change_list, difference
from stem_jax.checkpoints.items import ITEMS, PLAIN_ITEMS, plain_item, table_items
from stem_jax.config import MEMORY_SECTIONS
from stem_jax.errors import InputError
from stem_jax.files import write_whole
from stem_jax.memory.memory import STEM
from stem_jax.processes.agreement import PREPARING_SECONDS, exchange, is_first, unanimous
from stem_jax.storage import Place, is_remote
from stem_jax.tables import row_folder
from stem_jax.tables.saved_disk import SavedDisk

# What is written, and what is read.
FORMAT_VERSION = 4
FORMATS = (2, 3, FORMAT_VERSION)
# The metric that decides which checkpoint is the best.
BEST = "eval/loss"
FOLDER = "checkpoints"
# What makes a checkpoint in a bucket, which has no folders that get their name at the end, whole.
COMMITTED = "commit_success.txt"
ASIDE = "damaged_checkpoints"


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


def damage(
    folder: Place,
    *,
    verify: bool = False,
    share: tuple[int, int] = (0, 1),
    wanted: Callable[[str], bool] = lambda name: True,
    rows: bool = True,
) -> str | None:
    """What is wrong with the files of a checkpoint; None if nothing is.

    One without a list, as earlier versions wrote them, is whole if it has its items.

    Args:
        verify: compare checksums, too; of rows on disk, those of each row.
        share: (process, processes) that look at it together, see `file_list.difference`; also at
            what its tables build on, see `chain`.
        wanted: whether a file, by its name within the checkpoint, is asked for.
        rows: look at rows on disk, too.
    """
    if stored_size(folder / LIST) is None:
        return _missing_items(folder)
    found = difference(folder, wanted, verify=verify, share=share)
    found = found or base_damage(folder, verify=verify, share=share)
    return found or (_damaged_rows(folder, verify, share) if rows else None)


def _damaged_rows(folder: Place, verify: bool, share: tuple[int, int]) -> str | None:
    """What is wrong with rows that a checkpoint has on disk, where this machine has that disk.

    A process reads the rows that it wrote; process 0 looks at the sizes of all that it sees.
    """
    process, processes = share
    layout = plain_item(folder, "layout") or {}
    for name, record in layout.items():
        if not name.endswith("_disk"):
            continue
        saved = SavedDisk.from_record(record)
        for block in saved.blocks:
            own = block.process % processes == process
            of_block = block.folder(saved.folder)
            if not (own or process == 0) or not of_block.is_dir():
                continue
            notes = block.notes if verify else ()
            reason = row_folder.damage(of_block, saved.name, notes=notes, records=verify and own)
            if reason is not None:
                return reason
    return None


def check_format(folder: Place, version: int) -> None:
    """Raises InputError for a checkpoint of another format, `version`, than this code reads."""
    if version not in FORMATS:
        age = "an older" if version < FORMAT_VERSION else "a newer"
        known = " and ".join(map(str, FORMATS))
        raise InputError(
            f"checkpoint {folder} has format {version}, this version reads {known}; it was written "
            f"by {age} stem_jax, use that"
        )


def check_plain(folder: Place, remedy: str) -> None:
    """Refuses a checkpoint whose plain part, or whose list, is damaged, or of another format.

    Raises:
        InputError: names the file.
    """
    _check_known_format(folder)

    def is_plain(name: str) -> bool:
        return name.partition("/")[0] in (*PLAIN_ITEMS, name)

    _refuse(folder, damage(folder, verify=True, wanted=is_plain, rows=False), remedy)


def check_whole(
    folder: Place, remedy: str, *, optimizer: bool, share: tuple[int, int] = (0, 1)
) -> None:
    """Refuses a checkpoint that is damaged anywhere. Rows on disk are compared when they are read.

    Args:
        optimizer: whether the backbone's optimizer state is going to be read, too.
        share: see `damage`.

    Raises:
        InputError: names the file.
    """

    def is_read(name: str) -> bool:
        return optimizer or name.partition("/")[0] != "opt_state"

    found = damage(folder, verify=True, share=share, wanted=is_read, rows=False)
    _refuse(folder, found, remedy)


def _refuse(folder: Place, reason: str | None, remedy: str) -> None:
    if reason is not None:
        raise InputError(f"checkpoint {folder} is damaged ({reason}); {remedy}")


def _check_known_format(folder: Place) -> None:
    layout = plain_item(folder, "layout")
    if layout is not None and isinstance(layout.get("format"), int):
        check_format(folder, layout["format"])


def set_aside_damaged(checkpoints: Place, *, verify: bool = True) -> list[str]:
    """Moves damaged checkpoints that are newer than the newest whole one out of the way.

    Every process calls it; each looks at a part of the files.

    Args:
        checkpoints: the folder of all, which need not exist.
        verify: read all files of the newest, and compare their checksums.

    Returns a line for each. Raises InputError, in all processes, if no whole one is left, if one
    cannot be moved, and for one of another format: what is whole there, only its own version knows.
    """
    share = jax.process_index(), jax.process_count()

    def own_steps() -> bytes:
        with bucket_errors(checkpoints):
            there = list(checkpoints.iterdir()) if is_folder(checkpoints) else []
        return json.dumps([int(p.name) for p in there if is_checkpoint(p)]).encode()

    # As process 0 sees the folder, which another host may see later.
    steps = sorted(json.loads(exchange(own_steps)[0]), reverse=True)
    found: list[tuple[int, str]] = []
    for step in steps:
        folder = checkpoints / str(step)

        def reason(folder: Place = folder) -> bytes:
            with bucket_errors(folder):
                _check_known_format(folder)
                return json.dumps(damage(folder, verify=verify, share=share)).encode()

        reasons = map(json.loads, exchange(reason, PREPARING_SECONDS))
        first = next((why for why in reasons if why is not None), None)
        if first is None:
            break
        found.append((step, first))
    if found and len(found) == len(steps):
        raise InputError(
            f"no checkpoint in {checkpoints} is whole (the newest, {found[0][0]}: {found[0][1]}); "
            "bring its files back, or start in another --workdir"
        )
    with unanimous():
        if is_first():
            for step, why in found:
                _set_aside(checkpoints / str(step), why)
    aside = checkpoints.parent / ASIDE
    return [
        f"checkpoint {step} is damaged ({why}); moved to {aside / str(step)}" for step, why in found
    ]


def _set_aside(folder: Place, reason: str) -> None:
    target = folder.parent.parent / ASIDE / folder.name
    try:
        _move(folder, target)
    except OSError as error:
        raise InputError(
            f"checkpoint {folder} is damaged ({reason}) and cannot be moved to {target} "
            f"({error.strerror or error}); move or delete it to go on from the one before"
        ) from error


def is_checkpoint(folder: Place) -> bool:
    """Whether it has the name of one, and in a bucket the file that makes it whole."""
    if not folder.name.isdecimal():
        return False
    return not is_remote(folder) or stored_size(folder / COMMITTED) is not None


def _missing_items(folder: Place) -> str | None:
    """Which items a checkpoint without a list lacks; None if none."""
    config = plain_item(folder, "config") or {}

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


def _move(folder: Place, target: Place) -> None:
    if is_remote(folder):
        move_folder(folder, target, COMMITTED)
        return
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


def write_loss(folder: Place, loss: float) -> None:
    """Puts the validation loss where Orbax reads it when it opens the folder again.

    It would write it itself if it chose the best one by a function of its options, and then warns
    of every checkpoint that has none.
    """
    path, content = folder / "metrics" / "metrics", json.dumps({BEST: loss})
    if is_remote(folder):
        put(path, content.encode())
    else:
        write_whole(path, content)


def add_loss(folder: Place, loss: float) -> None:
    """The same, of a checkpoint that is listed already."""
    change_list(folder, "metrics/metrics", lambda: write_loss(folder, loss))
