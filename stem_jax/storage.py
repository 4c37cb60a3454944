"""Where files are: paths of this machine. Object storage has addresses, which are refused."""

import os
import re
from pathlib import Path

from stem_jax.errors import InputError

# Addresses also without their slashes, as `gs:/bucket` or `s3:bucket`: a path by that name would be
# a folder in the working directory, found by nobody.
_SCHEMES = """
    gs gcs s3 s3a s3n r2 az azure abfs abfss adl wasb wasbs oci oss cos hdfs viewfs webhdfs dbfs hf
    http https ftp sftp file
""".split()
# One letter is a drive of Windows.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/*)(.*)", re.DOTALL)


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
                f"{flag}={text} is an address{meant}, and object storage is not read or written; "
                f"copy it to, or mount it as, a folder of this machine and give that path, or "
                f"./{text} for a path by that name"
            )
    # Not Path.expanduser, which takes `./~` for a home, too.
    path = os.path.expanduser(text)
    if text.startswith("~") and path == text:
        raise InputError(
            f"{flag}={text} names the home of a user who has none here; give the whole path, or "
            f"./{text}"
        )
    return Path(path)
