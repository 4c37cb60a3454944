"""Where files are: paths of this machine, and addresses in object storage."""

import os
import re
from pathlib import Path
from typing import TypeAlias

from etils import epath

from stem_jax.errors import InputError

# Addresses also without their slashes, as `gs:/bucket` or `s3:bucket`: a path by that name would be
# a folder in the working directory, found by nobody.
_SCHEMES = """
    gs gcs s3 s3a s3n r2 az azure abfs abfss adl wasb wasbs oci oss cos hdfs viewfs webhdfs dbfs hf
    http https ftp sftp file
""".split()
# Those that are read and written, and what other programs call them.
BUCKETS = ("gs", "s3")
_ALSO_CALLED = {"gcs": "gs", "s3a": "s3", "s3n": "s3"}
# One letter is a drive of Windows.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/*)(.*)", re.DOTALL)

# A path of this machine, or the address of a folder or object in a bucket. Both know `/`, `name`,
# `parent`, `exists`, `is_dir`, `iterdir`, `read_bytes`, `write_bytes` and `open`.
Place: TypeAlias = Path | epath.Path


def place(text: str | Place, flag: str) -> Place:
    """What a flag or a key names: a path, with `~` expanded, or an address of a bucket.

    Args:
        text: a Path, or an address that was read already, stays what it is.
        flag: as the user gave it, such as `--workdir` or `data.folder`.

    Raises:
        InputError: for no name at all, for an address of another scheme than gs and s3 or in
            another form than gs://bucket/key, and for the home of a user who has none.
    """
    if not isinstance(text, str):
        return text
    found = _ADDRESS.fullmatch(text)
    if found is None:
        return local_path(text, flag)
    scheme, slashes, rest = found.groups()
    scheme = scheme.lower()
    if _ALSO_CALLED.get(scheme, scheme) not in BUCKETS:
        return local_path(text, flag)
    scheme = _ALSO_CALLED.get(scheme, scheme)
    form = f"{scheme}://{rest}"
    if (text != form or slashes != "//") and text != f"{scheme}://":
        example = form if rest.strip("/") else f"{scheme}://BUCKET/FOLDER"
        raise InputError(
            f"{flag}={text} is an address, which is written {example}; give that, or ./{text} for "
            "a path by that name"
        )
    if not rest.split("/")[0]:
        raise InputError(f"{flag}={text} names no bucket; give {scheme}://BUCKET/FOLDER")
    if ".." in rest.split("/"):
        raise InputError(f"{flag}={text} has `..`, which buckets do not know; give the whole name")
    return epath.Path(form.rstrip("/"))


def is_remote(path: str | Place) -> bool:
    """Whether it is the address of something in a bucket."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in BUCKETS))


def bucket_of(path: str | Place) -> tuple[str, str, str]:
    """Scheme, bucket, and key, which is "" for the bucket itself, of an address."""
    scheme, rest = os.fspath(path).split("://", 1)
    bucket, _, key = rest.partition("/")
    return scheme, bucket, key


def local_path(text: str | Path, flag: str) -> Path:
    """The path that a flag or a key of the configuration names, with `~` expanded.

    A name with a colon that is no address, such as `a/b:c`, is a path; a Path is one already.

    flag: as the user gave it, such as `--workdir` or `data.folder`.
    Raises InputError for no name at all, for the address of an object store or of any other scheme,
    and for the home of a user who has none.
    """
    if isinstance(text, Path):
        return text
    if not text:
        raise InputError(f"{flag}= is empty: give a path; . for this folder")
    found = _ADDRESS.fullmatch(text)
    if found is not None:
        scheme, slashes, rest = found.groups()
        if scheme.lower() == "file" and rest:
            raise InputError(f"{flag}={text} is an address; give the path itself: /{rest}")
        if len(slashes) >= 2 or scheme.lower() in _SCHEMES:
            form = f"{scheme.lower()}://{rest}"
            meant = "" if form == text else f" (an address is written {form})"
            raise InputError(
                f"{flag}={text} is an address{meant}, and object storage is not read or written "
                f"here; copy it to, or mount it as, a folder of this machine and give that path, "
                f"or ./{text} for a path by that name"
            )
    # Not Path.expanduser, which takes `./~` for a home, too.
    path = os.path.expanduser(text)
    if text.startswith("~") and path == text:
        raise InputError(
            f"{flag}={text} names the home of a user who has none here; give the whole path, or "
            f"./{text}"
        )
    return Path(path)
