"""Objects of buckets: what the paths of `etils.epath` lack, or do otherwise.

Small files go through fsspec's clients, as `etils.epath` does, arrays through TensorStore. What
both are told, where a store is and how patient they are, is said in one place, `prepare_clients`,
of the variables of the environment that the makers' own programs know.
"""

import contextlib
import datetime
import email.utils
import errno
import functools
import json
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from stem_jax.bucket_errors import bucket_errors
from stem_jax.bucket_reach import check_reached
from stem_jax.errors import InputError
from stem_jax.storage import Place, bucket_of, is_remote

# Of one request; a store that is there answers in a second.
_CONNECT_SECONDS = 10
_READ_SECONDS = 60
_ATTEMPTS = 6


class Stored(NamedTuple):
    """What a listing says of an object.

    version: another one whenever it is written with other content. written: when, in seconds, by
    the clock of the store.
    """

    size: int
    version: str
    written: float


class Found(NamedTuple):
    """An object as it was read.

    version: as of `Stored`. age: seconds since it was written, by the clock of the store.
    """

    content: bytes
    version: str
    age: float


@functools.cache
def prepare_clients() -> None:
    """Tells the clients, before the first of them is made, what they all have to know."""
    environ = os.environ
    # Each client knows one of the two alone.
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    if region:
        environ.setdefault("AWS_REGION", region)
        environ.setdefault("AWS_DEFAULT_REGION", region)
    emulator = environ.get("STORAGE_EMULATOR_HOST")
    if emulator:
        url = emulator if "://" in emulator else f"http://{emulator}"
        environ.setdefault("TENSORSTORE_GCS_HTTP_URL", url)
    # With TensorFlow installed, etils would read buckets by it, and S3 not at all.
    environ.setdefault("EPATH_USE_TF", "false")
    # It would ask each bucket by gRPC, which emulators and proxies lack, what it is made of.
    environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # What it logs it raises, too.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    import fsspec.config

    # What another process or TensorStore wrote is not in a listing that was kept.
    common: dict[str, Any] = {"use_listings_cache": False}
    retries = {"mode": "standard", "max_attempts": _ATTEMPTS}
    s3: dict[str, Any] = {
        "connect_timeout": _CONNECT_SECONDS,
        "read_timeout": _READ_SECONDS,
        "retries": retries,
    }
    if s3_endpoint():
        # As TensorStore does; few other stores have a host for each bucket.
        s3["s3"] = {"addressing_style": "path"}
    gs = {"token": "anon"} if emulator else {}
    for name, own in (("s3", {"config_kwargs": s3}), ("gs", gs), ("gcs", gs)):
        fsspec.config.conf[name] = {**common, **own, **fsspec.config.conf.get(name, {})}


def s3_endpoint() -> str | None:
    """Where the store is, if it is not Amazon's."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def read_object(path: Place) -> Found | None:
    """An object with what tells one writing of it from another; None if there is none.

    Raises:
        InputError: see `bucket_errors`, as for all that follow.
    """
    scheme, bucket, key = bucket_of(path)
    fs = _client(path)
    with bucket_errors(path):
        try:
            if scheme == "s3":
                answer, content = _wait(fs, _get_s3, fs, bucket, key)
                headers = answer["ResponseMetadata"]["HTTPHeaders"]
                version = answer["ETag"]
            else:
                url = "b/{}/o/{}"
                found, content = _wait(fs, fs._call, "GET", url, bucket, key, alt="media")
                headers = {name.lower(): value for name, value in found.items()}
                version = headers["x-goog-generation"]
        except FileNotFoundError:
            _check_bucket(path)
            return None
    return Found(content, version, _seconds(headers["date"]) - _seconds(headers["last-modified"]))


def put_if_absent(path: Place, content: bytes) -> bool:
    """Writes an object if there is none of the name; whether it did.

    The content should be nobody else's: by it a second attempt knows that the first one, whose
    answer was lost, had done it.
    """
    return _put(path, content, None)


def replace_if(path: Place, content: bytes, version: str) -> bool:
    """Writes an object if the one that is there is still this version; whether it did."""
    return _put(path, content, version)


def put(path: Place, content: bytes) -> None:
    """Writes an object, in place of one that is there."""
    with bucket_errors(path):
        try:
            _client(path).pipe_file(os.fspath(path), content)
        except FileNotFoundError as error:
            raise _no_bucket(path) from error


def remove_object(path: Place) -> None:
    """Removes an object, if it is there."""
    with bucket_errors(path), contextlib.suppress(FileNotFoundError):
        _client(path).rm_file(os.fspath(path))


def list_objects(folder: Place) -> dict[str, Stored]:
    """The objects below a folder, by their names from there on with `/`; none if there is none."""
    scheme, bucket, key = bucket_of(folder)
    prefix = f"{bucket}/{key}".rstrip("/") + "/"
    fs = _client(folder)
    with bucket_errors(folder):
        try:
            found = fs.find(prefix, detail=True)
        except FileNotFoundError:
            found = {}
        if not found:
            _check_bucket(folder)
    stored = _stored_s3 if scheme == "s3" else _stored_gs
    return {
        name.removeprefix(prefix): stored(entry)
        for name, entry in sorted(found.items())
        # Some programs make an empty object for a folder.
        if name.startswith(prefix) and not name.endswith("/") and entry["type"] == "file"
    }


def _stored_s3(entry: dict[str, Any]) -> Stored:
    return Stored(entry["size"], entry["ETag"], entry["LastModified"].timestamp())


def _stored_gs(entry: dict[str, Any]) -> Stored:
    written = datetime.datetime.fromisoformat(entry["updated"]).timestamp()
    return Stored(entry["size"], str(entry["generation"]), written)


def download(path: Place, target: Path) -> None:
    """Brings an object into a file, which is whole or as it was.

    Raises:
        FileNotFoundError: there is no such object.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with bucket_errors(path):
            _client(path).get_file(os.fspath(path), str(part))
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def upload(path: Path, target: Place) -> None:
    """Writes an object from a file as it is now."""
    with bucket_errors(target):
        try:
            _client(target).put_file(str(path), os.fspath(target))
        except FileNotFoundError as error:
            if not path.exists():
                raise
            raise _no_bucket(target) from error


def download_folder(source: Place, folder: Path) -> None:
    """Brings all objects below a folder of a bucket into one of this machine."""
    for name in list_objects(source):
        download(source / name, folder / name)


def upload_folder(folder: Path, target: Place, last: str | None = None) -> None:
    """Writes all files of a folder into one of a bucket.

    last: the file that makes the folder whole, which comes last; nobody sees it before the others.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in files]
    for name in sorted(names, key=lambda name: name == last):
        upload(folder / name, target / name)


def remove_folder(folder: Place, first: str | None = None) -> None:
    """Removes all objects below a folder. first: the one that makes it whole, which goes first."""
    names = list_objects(folder)
    for name in sorted(names, key=lambda name: name != first):
        remove_object(folder / name)


def move_folder(folder: Place, target: Place, whole: str) -> None:
    """Moves all objects below a folder, by the store itself; what is there at the target goes.

    whole: the one that makes the folder whole. Until all others are at the target it stays.
    """
    remove_folder(target, whole)
    names = list_objects(folder)
    with bucket_errors(folder):
        for name in sorted(names, key=lambda name: name == whole):
            _client(folder).cp_file(os.fspath(folder / name), os.fspath(target / name))
    remove_folder(folder, whole)


def is_folder(path: Place) -> bool:
    """Whether a folder is there, or any object below that name.

    The paths of `etils.epath` take an error of the network for an answer.
    """
    if not is_remote(path):
        return Path(path).is_dir()
    found = _info(path)
    return found is not None and found["type"] == "directory"


def read_file(path: Place) -> bytes:
    """The content of a file or an object.

    Raises:
        FileNotFoundError: there is none.
    """
    if not is_remote(path):
        return Path(path).read_bytes()
    found = read_object(path)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return found.content


def stored_size(path: Place) -> int | None:
    """Bytes of a file or an object; None if there is none."""
    if not is_remote(path):
        return os.stat(path).st_size if os.path.isfile(path) else None
    found = _info(path)
    return None if found is None or found["type"] == "directory" else found["size"]


def _info(path: Place) -> dict[str, Any] | None:
    with bucket_errors(path):
        try:
            return _client(path).info(os.fspath(path))
        except FileNotFoundError:
            _check_bucket(path)
            return None


def _client(path: Place) -> Any:
    """Of the store of a bucket, which is there."""
    prepare_clients()
    import fsspec

    scheme, _, _ = bucket_of(path)
    with bucket_errors(path):
        fs = fsspec.filesystem(scheme)
        check_reached(fs.s3.meta.endpoint_url if scheme == "s3" else fs._location, path)
        return fs


def _wait(fs: Any, call: Any, *args: Any, **options: Any) -> Any:
    from fsspec.asyn import sync

    return sync(fs.loop, call, *args, **options)


async def _get_s3(fs: Any, bucket: str, key: str) -> tuple[dict, bytes]:
    answer = await fs._call_s3("get_object", Bucket=bucket, Key=key)
    async with answer["Body"] as body:
        return answer, await body.read()


def _put(path: Place, content: bytes, version: str | None) -> bool:
    scheme, bucket, key = bucket_of(path)
    fs = _client(path)
    write = _put_s3 if scheme == "s3" else _put_gs
    with bucket_errors(path):
        try:
            _wait(fs, write, fs, bucket, key, content, version)
            return True
        except FileNotFoundError as error:
            if version is None:
                raise _no_bucket(path) from error
            return False
        except OSError as error:
            if not _is_refused(error):
                raise
    found = read_object(path)
    return found is not None and found.content == content


async def _put_s3(fs: Any, bucket: str, key: str, content: bytes, version: str | None) -> None:
    condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
    await fs._call_s3("put_object", Bucket=bucket, Key=key, Body=content, **condition)


async def _put_gs(fs: Any, bucket: str, key: str, content: bytes, version: str | None) -> None:
    mark = uuid.uuid4().hex
    head = f"--{mark}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n"
    body = (
        f"{head}{json.dumps({'name': key})}\r\n--{mark}\r\n"
        "Content-Type: application/octet-stream\r\n\r\n"
    ).encode()
    body += content + f"\r\n--{mark}--".encode()
    await fs._call(
        "POST",
        f"{fs._location}/upload/storage/v1/b/{bucket}/o",
        uploadType="multipart",
        ifGenerationMatch="0" if version is None else version,
        headers={"Content-Type": f'multipart/related; boundary="{mark}"'},
        data=body,
    )


def _is_refused(error: OSError) -> bool:
    """Whether a condition did not hold; S3 also says that two wrote at the same moment."""
    if isinstance(error, FileExistsError):
        return True
    response = getattr(error.__cause__, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return code in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")


def _check_bucket(path: Place) -> None:
    """Raises InputError if there is no such bucket: of one an object may be missing."""
    scheme, bucket, _ = bucket_of(path)
    fs = _client(path)
    try:
        if scheme == "s3":
            fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
        else:
            fs.call("GET", "b/{}/o", bucket, maxResults=1, json_out=True)
    except FileNotFoundError as error:
        raise _no_bucket(path) from error


def _no_bucket(path: Place) -> InputError:
    _, bucket, _ = bucket_of(path)
    return InputError(f"{path}: there is no bucket {bucket}; create it, or correct the name")


def _seconds(date: str) -> float:
    return email.utils.parsedate_to_datetime(date).timestamp()


def walk(folder: Place) -> Iterator[Place]:
    """All files below a folder, of this machine or of a bucket, in the order of their names."""
    if is_remote(folder):
        yield from (folder / name for name in list_objects(folder))
    else:
        yield from (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
