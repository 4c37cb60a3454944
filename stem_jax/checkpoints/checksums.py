"""Checksums of a checkpoint's files: each process makes those of what it wrote.

CRC-32 of zlib, as of rows on disk: it finds every flipped bit, and every run of up to 32 damaged
ones; of other damage it misses one in 4 billion. It runs at gigabytes a second, beside Python.

Orbax leaves what a process wrote of an item in a folder of the process's own:

    params/ocdbt.process_0/...     listed by process 0, in params/written_by_0.json
    params/ocdbt.process_1/...     listed by process 1
    params/d, params/_METADATA     listed at the end, by process 0
"""

import json
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from stem_jax.bucket import list_objects
from stem_jax.storage import Place, is_remote

# A size and a checksum, by name within a folder.
Facts = dict[str, list[int]]

_PIECE_BYTES = 2**24
# Files that are read at a time.
_READERS = 4
_OWN = "ocdbt.process_"
_PART = "written_by_"


def stored_size(path: Path) -> int:
    """Bytes of a file, also of an object in a bucket."""
    found: Any = path.stat()
    return found.length if hasattr(found, "length") else found.st_size


def sizes_in(folder: Place, names: Iterable[str]) -> dict[str, int]:
    """Bytes of those of these files that are there."""
    # One request for all, where they are in a bucket; a listing may lack what was just written.
    listed = list_objects(folder) if is_remote(folder) else {}
    found = {}
    for name in names:
        if name in listed:
            found[name] = listed[name].size
        elif (folder / name).is_file():
            found[name] = stored_size(folder / name)
    return found


def files_in(folder: Path) -> Iterator[Path]:
    """All files of a folder and of those in it."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.is_dir():
            yield from files_in(path)
        else:
            yield path


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    found = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            found = zlib.crc32(piece, found)
    return found


def checksums(paths: list[Path]) -> list[int]:
    """CRC-32 of files, of which some are read at a time."""
    with ThreadPoolExecutor(_READERS, "checksums") as pool:
        return list(pool.map(checksum, paths))


def facts_of(folder: Path, paths: list[Path]) -> Facts:
    """Sizes and checksums of files within a folder."""
    sums = checksums(paths)
    return {
        str(path.relative_to(folder)): [stored_size(path), found]
        for path, found in zip(paths, sums, strict=True)
    }


def writer_of(name: str) -> int | None:
    """The process that wrote a file of a checkpoint; None for what process 0 wrote for all."""
    for part in name.split("/"):
        if part.startswith(_OWN) and part.removeprefix(_OWN).isdecimal():
            return int(part.removeprefix(_OWN))
    return None


def take_parts(item: Path) -> Facts:
    """What the processes listed of an item, by name within it; their lists are removed."""
    found: Facts = {}
    for path in [path for path in item.iterdir() if path.name.startswith(_PART)]:
        found |= json.loads(path.read_bytes())
        path.unlink()
    return found


class _OwnPart:
    """Lists what this process wrote of an item. Orbax asks for the result once that is written."""

    def __init__(self, item: Path):
        self._item = item

    def result(self, timeout: float | None = None) -> None:
        """Orbax's futures before it have ended."""
        del timeout
        own = self._item / f"{_OWN}{jax.process_index()}"
        if own.is_dir():
            facts = facts_of(self._item, list(files_in(own)))
            path = self._item / f"{_PART}{jax.process_index()}.json"
            path.write_bytes(json.dumps(facts).encode())

    def cancel(self) -> None:
        """Nothing has begun."""


def listed(handler: Any) -> Any:
    """The handler of an item, after whose writes each process lists its own."""
    save = handler.async_save

    async def async_save(directory: Path, *args, **kwargs):
        futures = await save(directory, *args, **kwargs)
        return [*(futures or ()), _OwnPart(directory)]

    handler.async_save = async_save
    return handler
