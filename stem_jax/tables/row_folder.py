"""The folder that has the rows of one block: whose it is, and that one run at a time writes it.

facts.json        what the rows are of
.lock/            held by the run that writes
data/             the records, see `data_files`
saves/            see `saved_rows`
index-*           scratch, see `disk_index`
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stem_jax.errors import InputError
from stem_jax.files import read_json, write_whole
from stem_jax.lock import Lock
from stem_jax.tables.data_files import DataFiles, places_of_a_file
from stem_jax.tables.disk_space import FULL, full_disk
from stem_jax.tables.row_record import RecordField, RowRecord
from stem_jax.tables.saved_rows import (
    SAVES,
    SavedIndex,
    SavedRows,
    check_records,
    file_checksum,
    remove,
    saves_in,
)

DATA = "data"
_FACTS, _LOCK = "facts.json", ".lock"
_VERSION = 1
_REMEDY = "give another folder, or the run and the configuration that these rows are of"


def layout_facts(record: RowRecord, num_rows: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """All that has to be equal for rows of a folder to be read.

    Args:
        record: of a row.
        num_rows: of the block.
        facts: what else the rows depend on; anything that JSON has.
    """
    own = {
        "version": _VERSION,
        "num_rows": num_rows,
        "fields": record.facts(),
        "file_places": places_of_a_file(record.size, num_rows),
    }
    return json.loads(json.dumps(own | dict(facts)))


def check_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Refuses a folder that has no rows, or rows of another layout.

    Raises:
        InputError: the first difference.
    """
    path = folder / _FACTS
    if not path.exists():
        raise InputError(
            f"tables.disk: {folder} has no rows (no {_FACTS}); give the folder that the run wrote"
        )
    found = read_json(path, remedy=_REMEDY)
    if not isinstance(found, dict):
        raise InputError(f"{path} is no object; {_REMEDY}")
    for key in [*facts, *found]:
        if found.get(key) != facts.get(key):
            raise InputError(
                f"tables.disk: {folder} has rows of another layout: {key} is "
                f"{json.dumps(found.get(key))} there, {json.dumps(facts.get(key))} here; {_REMEDY}"
            )


def has_rows(folder: Path) -> bool:
    """Whether a run has written here."""
    return (folder / _FACTS).exists()


def lock(folder: Path) -> Lock:
    """Makes the folder, and holds it for this process.

    Raises:
        InputError: another run is there, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = Lock.take(folder / _LOCK, patient=True)
    except OSError as error:
        raise InputError(
            f"tables.disk: {folder} cannot be written ({error.strerror}); choose another folder"
        ) from error
    if taken is None:
        raise InputError(
            f"tables.disk: {folder} is in use by {Lock.holder(folder / _LOCK)}, another run; wait "
            "until that ends, or give another folder"
        )
    return taken


def begin(folder: Path, facts: Mapping[str, Any], *, replace: bool) -> None:
    """An empty folder for new rows, which is locked.

    Args:
        facts: from `layout_facts`.
        replace: also where saves are in it, which are dropped.

    Raises:
        InputError: it has saves, or cannot be written.
    """
    if (there := saves_in(folder)) and not replace:
        raise InputError(
            f"tables.disk: {folder} has rows of another run (saves {', '.join(there)}); give "
            "another folder, or remove that one first"
        )
    # The facts last: until then the saves are those of rows that can be read.
    for name in there:
        remove(folder, name)
    (folder / _FACTS).unlink(missing_ok=True)
    for name in (DATA, SAVES):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    write_whole(folder / _FACTS, json.dumps(facts, indent=1) + "\n")


def drop_unfinished(folder: Path, keep: set[str]) -> None:
    """Removes all saves but some, and what is left of saves that were never whole."""
    for name in saves_in(folder):
        if name not in keep:
            remove(folder, name)
    for path in (folder / SAVES).iterdir():
        if path.is_dir() and not path.name.startswith(".") and path.name not in keep:
            shutil.rmtree(path, ignore_errors=True)


def saved_rows(
    folder: Path, record: RowRecord, num_rows: int, facts: Mapping[str, Any], save: str
) -> SavedRows:
    """The rows of a save, to read. Nothing is read or locked before rows are asked for.

    Args:
        folder: of the block.
        record, num_rows, facts: as the run gave them to `RowFile`.
        save: its name.

    Raises:
        InputError: another layout, or no such save.
    """
    wanted = layout_facts(record, num_rows, facts)
    check_facts(folder, wanted)
    return SavedRows(folder / DATA, folder, record, wanted["file_places"], save)


def note_checksums(folder: Path, save: str) -> tuple[int, int]:
    """Of the files that say what all rows are of, and what a save has."""
    return file_checksum(folder / _FACTS), file_checksum(folder / SAVES / f"{save}.json")


def damage(
    folder: Path, save: str, *, notes: tuple[int, ...] = (), records: bool = False
) -> str | None:
    """What is wrong with a save, as far as its index and the sizes of files show it; or None.

    Args:
        notes: checksums of `note_checksums`, when it was made.
        records: read all its rows, too, and compare their checksums.
    """
    try:
        if notes and notes != (found := note_checksums(folder, save)):
            name = _FACTS if notes[0] != found[0] else f"{SAVES}/{save}.json"
            return f"{folder / name} is not as it was written (checksum)"
        index = SavedIndex(folder, save, verify=True)
        facts = read_json(folder / _FACTS, remedy=_REMEDY)
        record = RowRecord(tuple(RecordField(n, d, tuple(s)) for n, d, s in facts["fields"]))
        files = DataFiles(folder / DATA, record.size, facts["file_places"], writable=False)
    except InputError as error:
        return str(error)
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    try:
        last = int(index.places.max(initial=-1))
        if last >= files.capacity:
            return f"{files.path_of(last)} is missing or too short"
        if records:
            check_records(files, record, index)
    except InputError as error:
        return str(error)
    finally:
        files.close()
    return None


@contextlib.contextmanager
def released_on_error(held: Lock, folder: Path) -> Iterator[None]:
    """Gives the lock of a folder back if what follows fails; a full disk is an InputError."""
    try:
        yield
    except BaseException as error:
        held.release()
        if isinstance(error, OSError) and error.errno in FULL:
            files = [path for path in folder.rglob("*") if path.is_file()]
            taken = sum(path.stat().st_size for path in files)
            raise full_disk(folder, taken, 2**20, error.strerror or "no space left") from error
        raise
