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

from stem_jax.checkpoints.checksums import (
    Facts,
    checksums,
    facts_of,
    files_in,
    sizes_in,
    take_parts,
    writer_of,
)
from stem_jax.errors import InputError
from stem_jax.files import parse_json, write_whole

LIST = "files.json"
# What Orbax calls the note, and what stands in it here.
_COMMIT, _WHOLE = "commit_success.txt", b"files.json lists all files of this checkpoint\n"
# Orbax adds the time of the commit to it afterwards, where it writes the note itself.
_GROWS = "_CHECKPOINT_METADATA"


def write_list(folder: Path, late: Mapping[str, bytes] | None = None) -> None:
    """Lists all files of a checkpoint beside them.

    late: files that are written after this, and what will be in them.
    """
    facts: Facts = {}
    for item in [path for path in folder.iterdir() if path.is_dir()]:
        facts |= {f"{item.name}/{name}": found for name, found in take_parts(item).items()}
    there = {str(path.relative_to(folder)): path for path in files_in(folder)}
    others = [path for name, path in there.items() if name not in facts and name != LIST]
    facts |= facts_of(folder, others)
    for name, content in (late or {}).items():
        facts[name] = [len(content), zlib.crc32(content)]
    _put(folder / LIST, _text(facts))


def change_list(folder: Path, name: str, write: Callable[[], None]) -> None:
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


def read_list(folder: Path) -> dict[str, Any] | None:
    """By name, size and checksum, or the size alone; None where the list is not readable."""
    try:
        content = (folder / LIST).read_bytes()
        found = parse_json(content, LIST)
    except (OSError, InputError):
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
    folder: Path,
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
    for name, found in zip(names, checksums([folder / name for name in names]), strict=True):
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


def _put(path: Path, content: bytes) -> None:
    if isinstance(path, Path):
        write_whole(path, content)
    else:
        # Of a bucket, where every object appears whole.
        path.write_bytes(content)


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
            await asyncio.to_thread(_finish, _local(self.get()), _local(self.get_final()))

    return Listing


def _local(path: Any) -> Path:
    return path if "://" in str(path) else Path(path)


def _finish(folder: Path, final: Path) -> None:
    write_list(folder, {_COMMIT: _WHOLE})
    (folder / _COMMIT).write_bytes(_WHOLE)
    if folder != final:
        folder.rename(final)
