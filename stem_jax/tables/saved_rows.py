"""A save of rows on disk: where each row lay at that moment, in files that appear whole or not.

    saves/NAME/rows.npy       int32 [n], ascending
    saves/NAME/places.npy     int32 [n]
    saves/NAME/needed.npy     uint8, a bit a place
    saves/NAME.json           sizes and checksums of these; without it there is no save

The records lie in the data files, which all saves share; no place that a save names is written to
while it is kept.
"""

import json
import re
import shutil
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stem_jax.errors import InputError
from stem_jax.files import read_json, sync_all, sync_folder, write_whole
from stem_jax.json_fields import Fields
from stem_jax.tables.data_files import DataFiles
from stem_jax.tables.row_record import Arrays, RowRecord

SAVES = "saves"
# Of a row in the index of a save.
ROW_BYTES = 8
_ROWS, _PLACES, _NEEDED = "rows.npy", "places.npy", "needed.npy"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_PIECE_BYTES = 2**22
_REMEDY = "give another checkpoint, or begin a new run in another folder of tables.disk"


def check_name(name: str) -> None:
    """Raises ValueError for what cannot be the name of a save."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a save: letters, digits, _ . and -")


def saves_in(folder: Path) -> list[str]:
    """Names of the saves of a folder of rows."""
    return sorted(path.name.removesuffix(".json") for path in (folder / SAVES).glob("[!.]*.json"))


def parts_of(folder: Path, name: str) -> Path:
    """The folder of a save's index."""
    return folder / SAVES / name


def seal(folder: Path, name: str, count: int) -> None:
    """Makes a save of the files of its index, which are written.

    count: rows of it.

    Raises:
        OSError, InputError: the disk is full.
    """
    parts = parts_of(folder, name)
    sync_all(parts)
    files = {path.name: [path.stat().st_size, file_checksum(path)] for path in parts.iterdir()}
    content = json.dumps({"rows": count, "files": files}, indent=1)
    write_whole(folder / SAVES / f"{name}.json", content + "\n")


def remove(folder: Path, name: str) -> None:
    """A save that is no save any more, not even after a crash of the machine."""
    (folder / SAVES / f"{name}.json").unlink(missing_ok=True)
    sync_folder(folder / SAVES)
    shutil.rmtree(parts_of(folder, name), ignore_errors=True)


def write_index(
    folder: Path, name: str, pieces: Iterator[tuple[np.ndarray, np.ndarray]], count: int
) -> None:
    """Writes rows and their places, `count` of them, which come ascending by row.

    Raises:
        OSError: the disk is full.
    """
    parts = parts_of(folder, name)
    with (parts / _ROWS).open("wb") as rows_file, (parts / _PLACES).open("wb") as places_file:
        for file in (rows_file, places_file):
            header = {"descr": "<i4", "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(file, header)
        for rows, places in pieces:
            rows_file.write(np.ascontiguousarray(rows, "<i4").data)
            places_file.write(np.ascontiguousarray(places, "<i4").data)


def write_needed(folder: Path, name: str, bits: np.ndarray) -> None:
    """Writes the bitmap of the places.

    Raises:
        OSError: the disk is full.
    """
    np.save(parts_of(folder, name) / _NEEDED, bits)


def read_needed(folder: Path, name: str, capacity: int) -> np.ndarray:
    """The bitmap of the places of a save.

    capacity: places that the data files have.

    Raises:
        InputError: there is no such save, its bitmap is torn, or data files are missing.
    """
    SavedIndex(folder, name).verify(_NEEDED)
    bits = np.load(parts_of(folder, name) / _NEEDED)
    size = -(-capacity // 8)
    if bits[size:].any():
        raise InputError(
            f"tables.disk: data files of {folder} are missing or too short for its save {name}: "
            f"they have {capacity} places; {_REMEDY}"
        )
    return bits[:size]


class SavedIndex:
    """Rows of a save and their places, mapped: nothing is read before it is asked for."""

    def __init__(self, folder: Path, name: str, *, verify: bool = False):
        """
        Args:
            folder: of the rows.
            name: of the save.
            verify: read all of its files first.

        Raises:
            InputError: there is no such save, or a file of it is missing, has another size or,
                where they are read, is not as it was written.
        """
        where = folder / SAVES / f"{name}.json"
        if not where.exists():
            there = ", ".join(saves_in(folder)) or "none"
            raise InputError(
                f"tables.disk: {folder} has no save {name} (it has {there}); {_REMEDY}"
            )
        facts = Fields(read_json(where, remedy=_REMEDY), str(where), _REMEDY)
        self._parts = parts_of(folder, name)
        self.count = facts.integer("rows")
        files = facts.inner("files")
        self._facts = {file: files.integers(file, most=2**63) for file in (_ROWS, _PLACES, _NEEDED)}
        for file, (size, _) in self._facts.items():
            path = self._parts / file
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                said = "is missing" if found is None else f"has {found} bytes, expected {size}"
                raise InputError(f"{path}, of a save of rows, {said}; {_REMEDY}")
        if verify:
            self.verify()
        self.rows, self.places = (self._mapped(file) for file in (_ROWS, _PLACES))

    def verify(self, *names: str) -> None:
        """Reads these files of it, or all.

        Raises:
            InputError: a file is not as it was written.
        """
        for file in names or tuple(self._facts):
            checksum = self._facts[file][1]
            if (found := file_checksum(self._parts / file)) != checksum:
                raise InputError(
                    f"{self._parts / file}, of a save of rows, has the checksum {found}, expected "
                    f"{checksum}; {_REMEDY}"
                )

    def find(self, rows: np.ndarray) -> np.ndarray:
        """[n] int64, the places of rows [n]; -1 where a row is not in the save."""
        if not self.count:
            return np.full(len(rows), -1, np.int64)
        # Another dtype would convert all rows of the save first.
        wanted = np.asarray(rows, np.int32)
        at = np.minimum(np.searchsorted(self.rows, wanted), self.count - 1)
        return np.where(self.rows[at] == wanted, self.places[at].astype(np.int64), -1)

    def pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All rows and their places, some at a time."""
        piece = _PIECE_BYTES // 4
        for first in range(0, self.count, piece):
            yield self.rows[first : first + piece], self.places[first : first + piece]

    def _mapped(self, file: str) -> np.ndarray:
        if not self.count:
            return np.zeros(0, np.int32)
        try:
            array = np.load(self._parts / file, mmap_mode="r")
        except (ValueError, SyntaxError, tokenize.TokenError) as error:
            raise InputError(f"{self._parts / file} is no array ({error}); {_REMEDY}") from error
        if array.dtype != np.int32 or array.shape != (self.count,):
            raise InputError(f"{self._parts / file} is {array.dtype} {array.shape}; {_REMEDY}")
        return np.asarray(array)


class SavedRows:
    """Rows of a save, read as they are asked for; nobody may drop the save meanwhile.

    Any number of threads may read.
    """

    def __init__(self, data: Path, folder: Path, record: RowRecord, file_places: int, name: str):
        """Made by `row_folder.saved_rows`, which has looked at the layout."""
        self._record = record
        self._index = SavedIndex(folder, name)
        self._files = DataFiles(data, record.size, file_places, writable=False)

    @property
    def count(self) -> int:
        """Rows of the save."""
        return self._index.count

    @property
    def rows(self) -> np.ndarray:
        """[count] int32, ascending; mapped."""
        return self._index.rows

    def known(self, rows: np.ndarray) -> np.ndarray:
        """[n] bool, which of rows [n] are in the save."""
        return self._index.find(rows) >= 0

    def read(self, rows: np.ndarray, out: Arrays) -> None:
        """As `RowFile.read`."""
        read_records(self._files, self._record, rows, self._index.find(rows), out)

    def verify(self) -> None:
        """As `SavedIndex.verify`."""
        self._index.verify()

    def close(self) -> None:
        """Closes the files."""
        self._files.close()


def read_records(
    files: DataFiles, record: RowRecord, rows: np.ndarray, places: np.ndarray, out: Arrays
) -> None:
    """Reads rows [n] at places [n] into the first n of each field of `out`.

    Raises:
        KeyError: a row has no place.
        InputError: a record is not whole.
    """
    if len(missing := rows[places < 0]):
        raise KeyError(f"row {missing[0]} is not on disk")
    order = np.argsort(places)
    places = places[order]
    if len(places) and places[-1] >= files.capacity:
        path = files.path_of(int(places[-1]))
        raise InputError(f"{path} ends before place {places[-1]}, of a row; {_REMEDY}")
    records = files.read(places)
    if len(wrong := record.wrong(rows[order], records)):
        place, row = int(places[wrong[0]]), int(rows[order[wrong[0]]])
        raise InputError(
            f"{files.path_of(place)}: the record of row {row} at place {place} is torn, or not "
            f"this row's (checksum; {len(wrong)} of {len(rows)} read); {_REMEDY}"
        )
    record.unpack(records, out, order)


def check_records(files: DataFiles, record: RowRecord, index: SavedIndex) -> None:
    """Reads all rows of a save.

    Raises:
        InputError: a record is not whole.
    """
    count = max(1, _PIECE_BYTES // record.size)
    for rows, places in index.pieces():
        for first in range(0, len(rows), count):
            part = slice(first, first + count)
            found = rows[part].astype(np.int64), places[part].astype(np.int64)
            read_records(files, record, *found, record.empty(len(found[0])))


def file_checksum(path: Path) -> int:
    """CRC-32 of a file."""
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            checksum = zlib.crc32(piece, checksum)
    return checksum
