"""Results that go into a bucket: made on this machine, then uploaded, what makes them whole last.

A folder of a bucket cannot be renamed. So the file without which it is nothing comes last, and
until then an object `.unfinished` says who is at it:

    nothing is there               an upload may begin
    .unfinished of this machine    the same command goes on, or begins anew
    .unfinished of another         refused
    anything else                  refused, as a folder of this machine that exists
"""

import contextlib
import hashlib
import json
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from stem_jax.bucket import (
    list_objects,
    put_if_absent,
    read_object,
    remove_object,
    upload,
)
from stem_jax.compilation_cache import cache_home
from stem_jax.errors import InputError
from stem_jax.files import parse_json, read_json, write_whole
from stem_jax.lock import Lock
from stem_jax.storage import Place, is_remote
from stem_jax.unfinished import refused_writes

UNFINISHED = ".unfinished"


@contextlib.contextmanager
def outgoing(
    target: Place, flag: str, last: str, *, keep: bool = False, own: str = ""
) -> Iterator[Path]:
    """Where on this machine to make a folder that appears at `target` when the block has ended.

    A path of this machine is it itself.

    Args:
        target: a path, or the address of a folder of a bucket in which there is nothing.
        flag: that it was given by, for messages.
        last: the file that makes the folder whole.
        keep: what an earlier process of this machine left, for the block to go on with.
        own: an object that this process has there, which stays.

    Raises:
        InputError: see `bucket_errors`; something is there, or somebody is at it.
    """
    if not is_remote(target):
        yield Path(target)
        return
    where = f"{flag}={target}"
    check_free(target, flag, own)
    work = _work_folder(target)
    with refused_writes(where):
        work.mkdir(parents=True, exist_ok=True)
        lock = Lock.take(work.with_name(f"{work.name}.lock"))
    if lock is None:
        holder = Lock.holder(work.with_name(f"{work.name}.lock"))
        raise InputError(f"{where} is being written by {holder}; wait for it, or choose another")
    folder = work / target.name
    with lock:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        yield folder
        _upload(folder, target, where, last, work / "uploaded.json", own)
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def outgoing_file(target: Place, flag: str) -> Iterator[Path]:
    """Where on this machine to make a file that appears at `target` when the block has ended.

    A path of this machine is it itself.

    Raises:
        InputError: see `bucket_errors`; something is there.
    """
    if not is_remote(target):
        yield Path(target)
        return
    exists = InputError(f"{flag}={target} exists; choose another name, or remove it first")
    if read_object(target) is not None or list_objects(target):
        raise exists
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / target.name
        yield path
        if not put_if_absent(target, path.read_bytes()):
            raise exists


def check_free(target: Place, flag: str, own: str = "") -> None:
    """Raises InputError for a folder of a bucket in which something is.

    What an upload of this machine left that was stopped does not count, nor what it has there.
    """
    where = f"{flag}={target}"
    there = list_objects(target).keys() - {own}
    claim = read_object(target / UNFINISHED)
    if claim is None:
        if there or read_object(target) is not None:
            raise InputError(f"{where} exists; choose another name, or remove it first")
        return
    if claim.content != _claim(target):
        record = parse_json(claim.content, f"{target / UNFINISHED}")
        raise InputError(
            f"{where} is being written on host {record.get('host')}; wait for that, or, if it was "
            f"stopped for good, remove {target}/ and start again"
        )


def _upload(folder: Path, target: Place, where: str, last: str, record: Path, own: str) -> None:
    """Uploads what is not there yet."""
    if not put_if_absent(target / UNFINISHED, _claim(target)):
        raise InputError(f"{where} is being written by another process; choose another name")
    # Of each name the version in the bucket, and what was uploaded.
    done = read_json(record) if record.exists() else {}
    listed = list_objects(target)
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    names = sorted(name for name in files if not name.startswith("."))
    for name in sorted(set(listed) - {UNFINISHED, own, *names}):
        # Of an earlier one that made something else.
        remove_object(target / name)
    for name in names:
        state = [files[name].stat().st_size, files[name].stat().st_mtime_ns]
        if name == last or (name in listed and done.get(name) == [listed[name].version, *state]):
            continue
        upload(files[name], target / name)
        found = list_objects(target / name.rpartition("/")[0] if "/" in name else target)
        done[name] = [found[name.rpartition("/")[2]].version, *state]
        write_whole(record, json.dumps(done) + "\n")
    if not put_if_absent(target / last, files[last].read_bytes()):
        raise InputError(f"{where} was written by another process meanwhile; choose another name")
    remove_object(target / UNFINISHED)


def _work_folder(target: Place) -> Path:
    digest = hashlib.sha256(str(target).encode()).hexdigest()
    return cache_home() / "stem_jax" / "outgoing" / digest[:16]


def _claim(target: Place) -> bytes:
    """Who writes there: on a machine one process alone has the folder that it names."""
    facts = {"host": socket.gethostname(), "folder": str(_work_folder(target).absolute())}
    return (json.dumps(facts) + "\n").encode()
