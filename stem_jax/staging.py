"""Copies on this machine of what is read from a bucket: whole, of one version, within a bound.

What a program maps into memory or reads many times is downloaded whole before it is read. Copies
lie in the user's cache, or where the environment says, and stay for the next start:

    ENTRY/           a copy, whole and checked; its name is made of the address and of the versions
                     of all objects, so that other content gets a copy of its own
    ENTRY.part/      a copy under way; every file in it is whole, and a later start goes on
    ENTRY.json       what it is a copy of, and its bytes; its time is that of the last use
    ENTRY.use/       lock of all processes that read it: a copy in use stays
    ENTRY.loading/   lock of the process that downloads it, for which others wait
    room/            lock of whoever takes an entry or makes room
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from stem_jax.bucket import Stored, download, list_objects, read_object
from stem_jax.compilation_cache import cache_home
from stem_jax.errors import InputError
from stem_jax.files import read_json, write_whole
from stem_jax.lock import Lock
from stem_jax.storage import Place
from stem_jax.unfinished import refused_writes

# Where copies lie, and how much of them there may be, in GiB; without it, what the disk has.
FOLDER, BOUND = "STEM_JAX_STAGED", "STEM_JAX_STAGED_GIB"
# How often, and how long after, a listing is read again that lacks what is there, and a download
# is begun anew under which the bucket changed.
_ATTEMPTS, _AGAIN_SECONDS = 3, 2.0
_POLL_SECONDS = 0.2

Wanted: TypeAlias = Callable[[str], bool]
Check: TypeAlias = Callable[[Path], None]

# Of the entries that this process reads, as long as it lives.
_in_use: dict[Path, Lock] = {}
# By address, the name of the entry that this process got last: of the objects' versions.
_versions: dict[str, str] = {}


def staged(
    address: Place,
    flag: str,
    *,
    wanted: Wanted = lambda name: True,
    asked: Sequence[str] = (),
    check: Check = lambda folder: None,
) -> Path:
    """The copy of a folder of a bucket, which this process then may read as long as it lives.

    Args:
        address: of the folder.
        flag: that it was given by, for messages.
        wanted: which of its objects, by their names from there on. Names with a dot before them
            belong to whoever writes there.
        asked: names that the bucket is asked for by themselves, should the listing not have them.
        check: raises InputError for a copy that is damaged.

    Raises:
        InputError: see `bucket_errors`; there is nothing; it changes while it is read; it is
            damaged in the bucket; there is no room for it.
    """
    _bound()
    for _ in range(_ATTEMPTS):
        listed = _listed(address, flag, wanted, asked)
        if not listed:
            raise InputError(f"{flag}={address}: nothing is there; correct the name")
        if (copy := _copy(address, flag, listed, wanted, check)) is not None:
            _versions[str(address)] = copy.name
            return copy
        time.sleep(_AGAIN_SECONDS)
    raise InputError(
        f"{flag}={address} is written while it is read; start again when that has ended"
    )


def staged_versions() -> dict[str, str]:
    """A text for each address that this process has a copy of, which is another where the copy is
    of other versions: each machine copies by itself, and somebody may have written in between."""
    return dict(_versions)


def staging_folder() -> Path:
    """Where the copies lie."""
    given = os.environ.get(FOLDER)
    return Path(given).expanduser().absolute() if given else cache_home() / "stem_jax" / "staged"


def _listed(address: Place, flag: str, wanted: Wanted, asked: Sequence[str]) -> dict[str, Stored]:
    """What is to be copied. A listing may lack what was just written."""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_AGAIN_SECONDS)
        listed = _objects(address, wanted)
        absent = [n for n in asked if n not in listed and read_object(address / n) is not None]
        if not absent:
            return listed
    raise InputError(
        f"{flag}={address} has {absent[0]}, which the bucket does not list yet; try again"
    )


def _objects(address: Place, wanted: Wanted) -> dict[str, Stored]:
    return {
        name: stored
        for name, stored in list_objects(address).items()
        if wanted(name) and not any(part.startswith(".") for part in name.split("/"))
    }


def _copy(
    address: Place, flag: str, listed: dict[str, Stored], wanted: Wanted, check: Check
) -> Path | None:
    """The copy of these versions; None if they are not what the bucket has any more."""
    root = staging_folder()
    entry = root / _name_of(address, listed)
    where = f"{flag}={address}"
    with refused_writes(f"{where}: the folder {root} of {FOLDER}"):
        root.mkdir(parents=True, exist_ok=True)
        with _alone(_beside(entry, "loading"), str(address)):
            made = None
            try:
                with _alone(root / "room"):
                    _use(entry)
                    size = sum(stored.size for stored in listed.values())
                    record = {"address": str(address), "bytes": size}
                    write_whole(_beside(entry, "json"), json.dumps(record) + "\n")
                    if entry.is_dir():
                        made = entry
                    else:
                        _make_room(entry, size, where)
                made = made or _downloaded(address, where, listed, wanted, check, entry)
                return made
            finally:
                if made is None:
                    _give_back(entry)


def _downloaded(
    address: Place,
    where: str,
    listed: dict[str, Stored],
    wanted: Wanted,
    check: Check,
    entry: Path,
) -> Path | None:
    part = _beside(entry, "part")
    went_on = part.is_dir()
    try:
        _download(address, listed, part)
        changed = _objects(address, wanted) != listed
    except FileNotFoundError:
        changed = True
    if changed:
        _drop(entry)
        return None
    try:
        check(part)
    except InputError as error:
        _drop(entry)
        if went_on:
            # What an earlier start left here may have been damaged on this disk.
            return None
        said = str(error).replace(str(part), str(address)).replace("\n", " ")
        raise InputError(f"{where} is damaged in the bucket: {said}") from error
    part.rename(entry)
    return entry


def _download(address: Place, listed: dict[str, Stored], part: Path) -> None:
    """What the folder does not have yet."""
    part.mkdir(exist_ok=True)
    for path in sorted(part.rglob("*")):
        # Of a download that was killed.
        if path.is_file() and path.relative_to(part).as_posix() not in listed:
            path.unlink()
    for name, stored in listed.items():
        path = part / name
        if path.is_file() and path.stat().st_size == stored.size:
            continue
        download(address / name, path)
        # The same for every copy: what was made from it may name it.
        os.utime(path, (0, 0))


def _make_room(entry: Path, size: int, where: str) -> None:
    """Removes what was not used for longest, and is not in use, until a copy of a size fits."""
    root, bound = entry.parent, _bound()
    others = {}
    for path in root.glob("*.json"):
        if path.stem != entry.name:
            others[path.stem] = (path.stat().st_mtime_ns, read_json(path)["bytes"])
    part = _beside(entry, "part")
    there = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())

    def lacking() -> float:
        kept = sum(number for _, number in others.values())
        return max(kept + size - bound, size - there - shutil.disk_usage(root).free)

    for name, _ in sorted(others.items(), key=lambda item: item[1]):
        if lacking() <= 0:
            return
        lock = Lock.take(_beside(root / name, "use"))
        if lock is not None:
            with lock:
                _drop(root / name)
            del others[name]
    if lacking() > 0:
        _drop(entry)
        raise InputError(
            f"{where} has {size / 2**20:,.1f} MiB, {lacking() / 2**20:,.1f} more than there is "
            f"room for beside the copies that are in use in {root}; set {BOUND} higher, or "
            f"{FOLDER} to a folder on a larger disk"
        )


def _bound() -> float:
    given = os.environ.get(BOUND)
    if not given:
        return float("inf")
    try:
        number = float(given)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise InputError(f"{BOUND}={given} is not a size; give GiB, such as 100")
    return number * 2**30


def _drop(entry: Path) -> None:
    """Removes a copy. One that was whole has another name first, of which parts may be missing."""
    part = _beside(entry, "part")
    if entry.is_dir():
        shutil.rmtree(part, ignore_errors=True)
        entry.rename(part)
    shutil.rmtree(part, ignore_errors=True)
    _beside(entry, "json").unlink(missing_ok=True)


def _use(entry: Path) -> None:
    if entry not in _in_use:
        _in_use[entry] = Lock.join(_beside(entry, "use"))


def _give_back(entry: Path) -> None:
    if (lock := _in_use.pop(entry, None)) is not None:
        lock.release()


@contextlib.contextmanager
def _alone(path: Path, what: str = "") -> Iterator[None]:
    """Holds a lock, for which it waits. what: others may be doing for long, for a message."""
    told = not what
    while (lock := Lock.take(path)) is None:
        if not told:
            print(f"waiting for {Lock.holder(path)}, which downloads {what}", file=sys.stderr)
            told = True
        time.sleep(_POLL_SECONDS)
    with lock:
        yield


def _beside(entry: Path, ending: str) -> Path:
    return entry.with_name(f"{entry.name}.{ending}")


def _name_of(address: Place, listed: dict[str, Stored]) -> str:
    versions = sorted((name, stored.size, stored.version) for name, stored in listed.items())
    digest = hashlib.sha256(json.dumps([str(address), *versions]).encode()).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9]+", "-", str(address)).strip("-")[-40:]
    return f"{readable}-{digest[:16]}"
