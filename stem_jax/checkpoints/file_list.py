"""The list of a checkpoint's files, `files.json`: their sizes and checksums.

    {"crc32": of the text of "files", "files": {"params/d/0f...": [size, crc32], ...}}

It is the last thing that is written of a checkpoint but for Orbax's note that it is whole, which it
lists, too. Lists of earlier versions have sizes alone: {"params/d/0f...": size, ...}.
"""

import asyncio
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stem_jax.bucket import put, read_file, walk
from stem_jax.checkpoints.checksums import (
    Facts,
    facts_of,
    is_part,
    sizes_in,
    take_parts,
    writer_of,
)
from stem_jax.errors import InputError
from stem_jax.files import parse_json, write_whole
from stem_jax.storage import Place, is_remote

LIST = "files.json"
# What Orbax calls the note, and what stands in it here.
_COMMIT, _WHOLE = "commit_success.txt", b"files.json lists all files of this checkpoint\n"
# Orbax adds the time of the commit to it afterwards, where it writes the note itself.
_GROWS = "_CHECKPOINT_METADATA"


def write_list(folder: Place, late: Mapping[str, bytes] | None = None) -> None:
    """Lists all files of a checkpoint beside them.

    late: files that are written after this, and what will be in them.
    """
    there = {str(path.relative_to(folder)): path for path in walk(folder)}
    parts = list(filter(is_part, there))
    facts = take_parts(folder, parts)
    known = {*facts, *parts, LIST}
    facts |= facts_of(folder, [path for name, path in there.items() if name not in known])
    for name, content in (late or {}).items():
        facts[name] = [len(content), zlib.crc32(content)]
    _put(folder / LIST, _text(facts))


def change_list(folder: Place, name: str, write: Callable[[], None]) -> None:
    """Writes a file of a checkpoint that is whole, and lists it; it is damaged at no moment."""
    facts = read_list(folder)
    if facts is None or not _has_checksums(facts):
        # Of an earlier version, which does not list what comes later.
        write()
        return
    if facts.pop(name, None) is not None:
        _put(folder / LIST, _text(facts))
    write()
    _put(folder / LIST, _text(facts | facts_of(folder, [folder / name])))


def read_list(folder: Place) -> dict[str, Any] | None:
    """By name, size and checksum, or the size alone; None where the list is not readable.

    Raises:
        InputError: see `bucket_errors`.
    """
    try:
        content = read_file(folder / LIST)
    except OSError:
        return None
    try:
        found = parse_json(content, LIST)
    except InputError:
        return None
    if not isinstance(found, dict):
        return None
    if all(isinstance(size, int) for size in found.values()):
        return found
    # Every bit of it counts.
    facts = found.get("files")
    if not isinstance(facts, dict) or content != _text(facts):
        return None
    return facts


def difference(
    folder: Place,
    wanted: Callable[[str], bool] = lambda name: True,
    *,
    verify: bool = False,
    share: tuple[int, int] = (0, 1),
) -> str | None:
    """What is otherwise in a folder than in its list; None if nothing is.

    Args:
        wanted: whether a file, by its name, is asked for.
        verify: compare checksums, too.
        share: (process, processes) that compare them together. What process 0 wrote for all is
            compared by each, of the rest every file by one.
    """
    facts = read_list(folder)
    if facts is None:
        return f"{LIST} is not readable"
    facts = {name: found for name, found in facts.items() if wanted(name)}
    with_checksums = _has_checksums(facts)
    there = sizes_in(folder, facts)
    for name, found in facts.items():
        size = found[0] if with_checksums else found
        if name not in there:
            return f"{name} is missing"
        if (with_checksums or name != _GROWS) and there[name] != size:
            return f"{name} has {there[name]} bytes of {size}"
    if not verify or not with_checksums:
        return None
    names = _share_of(facts, *share)
    for name, (_, found) in facts_of(folder, [folder / name for name in names]).items():
        if found != facts[name][1]:
            return f"{name} has the checksum {found:08x}, not {facts[name][1]:08x}"
    return None


def _share_of(facts: Facts, process: int, processes: int) -> list[str]:
    """The files that a process compares: its own where as many wrote them, else like many bytes."""
    writers = {name: writer_of(name) for name in facts}
    by_writer = len(set(writers.values()) - {None}) == processes
    load = [0] * processes
    mine = []
    for name in sorted(facts, key=lambda name: (-facts[name][0], name)):
        writer = writers[name]
        if writer is None:
            mine.append(name)
            continue
        chosen = writer % processes if by_writer else load.index(min(load))
        load[chosen] += facts[name][0]
        if chosen == process:
            mine.append(name)
    return mine


def _has_checksums(facts: Mapping[str, Any]) -> bool:
    return not any(isinstance(found, int) for found in facts.values())


def _text(facts: Facts) -> bytes:
    files = json.dumps(facts, indent=0, sort_keys=True)
    return json.dumps(
        {"crc32": zlib.crc32(files.encode()), "files": facts}, indent=0, sort_keys=True
    ).encode()


def _put(path: Place, content: bytes) -> None:
    if is_remote(path):
        # Where every object appears whole.
        put(path, content)
    else:
        write_whole(path, content)


def listing(base: Any) -> Any:
    """A class of Orbax for a checkpoint that is being written: it lists the files at the end."""

    class Listing(base):
        async def finalize(self) -> None:
            # Items have a path each, of which the checkpoint's alone notes what it has.
            store = self._checkpoint_metadata_store
            if store is None:
                await super().finalize()
                return
            await asyncio.to_thread(store.wait_until_finished)
            await asyncio.to_thread(_finish, _place(self.get()), _place(self.get_final()))

    return Listing


def _place(path: Any) -> Place:
    """Orbax has paths of `etils.epath` for all."""
    return path if is_remote(path) else Path(path)


def _finish(folder: Place, final: Place) -> None:
    write_list(folder, {_COMMIT: _WHOLE})
    _put(folder / _COMMIT, _WHOLE)
    if folder != final:
        folder.rename(final)
