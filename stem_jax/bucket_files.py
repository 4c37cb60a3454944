"""What flags name in a bucket: brought to this machine before the work, sent there after it.

Programs see paths of this machine alone. What they write below a run folder that they opened, or
where a flag asked for results, goes to the bucket when they end well, see `upload_written`.
"""

import shutil
from pathlib import Path

from stem_jax.bucket import download, list_objects, stored_size, upload, walk
from stem_jax.bucket_errors import bucket_errors
from stem_jax.errors import InputError
from stem_jax.local_copy import CHECKPOINTS, LocalCopy, copy_folder, naming
from stem_jax.storage import Place, is_remote, place

_runs: list[LocalCopy] = []
_results: dict[Path, Place] = {}
# Whatever of this machine stands for an address, for messages.
_addresses: dict[Path, Place] = {}


def opened(text: str | Path, flag: str) -> Path:
    """The folder of a run for reading: a path, or this machine's copy of one in a bucket, up to
    date.

    Raises:
        InputError: see `place` and `bucket_errors`; no run is there.
    """
    folder = seen(text, flag)
    if folder in _addresses:
        address = _addresses[folder]
        with naming(address, flag):
            if not list_objects(address / CHECKPOINTS):
                raise InputError(
                    f"{address}: it has no checkpoint; give the folder of a training run"
                )
    return folder


def seen(text: str | Path, flag: str) -> Path:
    """The same of a run that may have no checkpoint yet.

    Raises:
        InputError: see `place` and `bucket_errors`; nothing is there.
    """
    found = place(text, flag)
    if not is_remote(found):
        return Path(found)
    with naming(found, flag):
        copy = LocalCopy(found, copy_folder(found, "reading"))
        if not copy.fetch():
            raise InputError(f"{found}: nothing is there; correct the name")
    _runs.append(copy)
    _addresses[copy.folder] = found
    return copy.folder


def fetched(text: str, flag: str) -> Path:
    """A file to read: a path, or this machine's copy of an object.

    Raises:
        InputError: see `place` and `bucket_errors`; there is no such object.
    """
    found = place(text, flag)
    if not is_remote(found):
        return Path(found)
    path = copy_folder(found, "files")
    try:
        with bucket_errors(found, flag):
            download(found, path)
    except FileNotFoundError as error:
        raise InputError(f"{flag}={found}: there is no such object; correct the name") from error
    _addresses[path] = found
    return path


def result(text: str, flag: str) -> Path:
    """Where to write a file or a folder of results: a path, or one for what goes into a bucket.

    An object that is there is brought, so that what it is refused for, or gone on with, is as of a
    file. Without one, what a program that was stopped left on this machine is there.

    Raises:
        InputError: see `place` and `bucket_errors`.
    """
    found = place(text, flag)
    if not is_remote(found):
        return Path(found)
    path = copy_folder(found, "results")
    with naming(found, flag):
        if stored_size(found) is not None:
            download(found, path)
    _results[path] = _addresses[path] = found
    return path


def upload_written() -> None:
    """Sends what this program wrote below the runs that it opened, and its results.

    Raises:
        InputError: see `bucket_errors`.
    """
    while _runs:
        _runs.pop().upload()
    while _results:
        path, address = _results.popitem()
        if path.is_dir():
            for file in walk(path):
                upload(file, address / file.relative_to(path).as_posix())
            shutil.rmtree(path)
        elif path.exists():
            upload(path, address)
            path.unlink()


def shown(path: str | Path) -> str:
    """A path as the user knows it: an address where it stands for one."""
    for one in (Path(path), *Path(path).parents):
        if one in _addresses:
            return str(_addresses[one] / Path(path).relative_to(one).as_posix()).rstrip("/.")
    return str(path)


def as_given(message: str) -> str:
    """A message with addresses in place of what stands for them on this machine."""
    for path, address in sorted(_addresses.items(), key=lambda pair: -len(str(pair[0]))):
        message = message.replace(str(path), str(address))
    return message
