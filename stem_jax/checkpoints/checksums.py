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
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from stem_jax.bucket import list_objects, put, read_file, remove_object, stored_size, walk
from stem_jax.bucket_errors import bucket_errors
from stem_jax.storage import Place, is_remote

# A size and a checksum, by name within a folder.
Facts = dict[str, list[int]]

_PIECE_BYTES = 2**24
# Files that are read at a time.
_READERS = 4
_OWN = "ocdbt.process_"
_PART = "written_by_"


def sizes_in(folder: Place, names: Iterable[str]) -> dict[str, int]:
    """Bytes of those of these files that are there."""
    # One request for all, where they are in a bucket; a listing may lack what was just written.
    listed = list_objects(folder) if is_remote(folder) else {}
    found = {}
    for name in names:
        size = listed[name].size if name in listed else stored_size(folder / name)
        if size is not None:
            found[name] = size
    return found


def facts(path: Place) -> list[int]:
    """Size and CRC-32 of a file.

    Raises:
        FileNotFoundError: there is none.
    """
    size = found = 0
    with bucket_errors(path), path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            size += len(piece)
            found = zlib.crc32(piece, found)
    return [size, found]


def facts_of(folder: Place, paths: list[Place]) -> Facts:
    """Those of files within a folder, of which some are read at a time."""
    with ThreadPoolExecutor(_READERS, "checksums") as pool:
        found = list(pool.map(facts, paths))
    return {str(path.relative_to(folder)): fact for path, fact in zip(paths, found, strict=True)}


def writer_of(name: str) -> int | None:
    """The process that wrote a file of a checkpoint; None for what process 0 wrote for all."""
    for part in name.split("/"):
        if part.startswith(_OWN) and part.removeprefix(_OWN).isdecimal():
            return int(part.removeprefix(_OWN))
    return None


def is_part(name: str) -> bool:
    """Whether a file of a checkpoint is what a process listed of an item."""
    item, _, file = name.partition("/")
    return bool(item) and file.startswith(_PART)


def take_parts(checkpoint: Place, names: Iterable[str]) -> Facts:
    """What the processes listed, by name within the checkpoint; their lists are removed.

    names: of the lists, see `is_part`.
    """
    found: Facts = {}
    for name in names:
        item = name.partition("/")[0]
        listed = json.loads(read_file(checkpoint / name))
        found |= {f"{item}/{file}": fact for file, fact in listed.items()}
        if is_remote(checkpoint):
            remove_object(checkpoint / name)
        else:
            (checkpoint / name).unlink()
    return found


class _OwnPart:
    """Lists what this process wrote of an item. Orbax asks for the result once that is written."""

    def __init__(self, item: Path):
        self._item = item

    def result(self, timeout: float | None = None) -> None:
        """Orbax's futures before it have ended."""
        del timeout
        own = list(walk(self._item / f"{_OWN}{jax.process_index()}"))
        if own:
            path = self._item / f"{_PART}{jax.process_index()}.json"
            content = json.dumps(facts_of(self._item, own)).encode()
            if is_remote(path):
                put(path, content)
            else:
                path.write_bytes(content)

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
