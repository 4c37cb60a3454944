"""Source archives of packages: fetched from the package index, checked, read without unpacking.

No code of a package runs, and nothing of it is written but the archive itself.
"""

import contextlib
import fnmatch
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from stem_jax.errors import InputError
from stem_jax.files import write_whole
from stem_jax.study.recipes import Package

_INDEX = "https://pypi.org/simple"
_TIMEOUT_SECONDS = 120.0
# Of one file in an archive; text that people write is far smaller.
_MAX_MEMBER_BYTES = 20_000_000
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, OSError)


def cache_folder() -> Path:
    """Where archives are kept: `stem_jax/packages` in the user's cache folder."""
    # An empty variable means the default, too.
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stem_jax/packages"


def fetch(package: Package, cache: Path) -> bytes:
    """The archive of a package, from the cache or else from the index, into the cache.

    The index is pip's own: PIP_INDEX_URL, pip's configuration, or the public one.

    Raises:
        InputError: it cannot be had, or its SHA-256 is not the recipe's.
    """
    path = cache / package.file
    if path.exists():
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"archive {path} cannot be read ({error.strerror}): remove it to fetch it again"
            ) from error
        return _checked(content, package, str(path), "remove it to fetch it again")
    content = _download(package)
    _checked(content, package, package.file, "the index gives another file than the recipe names")
    write_whole(path, content)
    return content


def members(package: Package, content: bytes) -> Iterator[tuple[str, bytes]]:
    """(path below the top folder, bytes) of the files that a package's patterns take, by path.

    Links, devices and files over 20 MB are left out.

    Raises:
        InputError: the archive is damaged, names a place outside itself, or nothing matches.
    """
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:*") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise InputError(
                        f"archive {package.file} has a file named {member.name!r}, outside its"
                        " folder: it is no source archive, name another version"
                    )
                below = "/".join(path.parts[1:])
                taken = any(fnmatch.fnmatchcase(below, pattern) for pattern in package.take)
                if taken and member.isreg() and member.size <= _MAX_MEMBER_BYTES:
                    file = archive.extractfile(member)
                    assert file is not None
                    found[below] = file.read()
    except _DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"archive {package.file} is damaged or no tar archive ({reason}): fetch it again, or"
            " name another file"
        ) from error
    if not found:
        raise InputError(
            f"archive {package.file} has no file that {' '.join(package.take)} takes: correct the"
            f" patterns of package {package.name}"
        )
    yield from sorted(found.items())


def _checked(content: bytes, package: Package, where: str, remedy: str) -> bytes:
    found = hashlib.sha256(content).hexdigest()
    if found != package.sha256:
        raise InputError(
            f"archive {where} has SHA-256 {found[:12]}, not {package.sha256[:12]}: {remedy}"
        )
    return content


def _download(package: Package) -> bytes:
    try:
        import unearth
        from unearth.fetchers import PyPIClient
    except ImportError as error:
        raise InputError(
            f"archive {package.file} is fetched with unearth, which is missing: pip install unearth"
        ) from error
    try:
        # Any: its own finder takes it, though it says that it takes something narrower.
        opened: Any = PyPIClient(timeout=_TIMEOUT_SECONDS)
        with contextlib.closing(opened) as client:
            finder = unearth.PackageFinder(
                client,
                index_urls=[_pip_setting("index-url") or _INDEX],
                no_binary=[":all:"],
                # A text is the same whatever Python reads it.
                ignore_compatibility=True,
            )
            matches = finder.find_matches(f"{package.name}=={package.version}")
            link = next((m.link for m in matches if m.link.filename == package.file), None)
            if link is None:
                raise InputError(
                    f"the package index has no file {package.file}: set PIP_INDEX_URL to one that"
                    f" has it, or put the file into {cache_folder()}"
                )
            response = client.get(link.normalized, follow_redirects=True)
            response.raise_for_status()
            return response.content
    except InputError:
        raise
    # What a network may do wrong has no common class among the client's errors.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"archive {package.file} could not be fetched ({reason}): look after the network and"
            f" PIP_INDEX_URL, or put the file into {cache_folder()}"
        ) from error


def _pip_setting(name: str) -> str:
    """What pip's variables or files say of a setting; "" where they say nothing."""
    from_variable = os.environ.get(f"PIP_{name.upper().replace('-', '_')}")
    if from_variable:
        return from_variable
    asked = [sys.executable, "-m", "pip", "config", "get", f"global.{name}"]
    # No pip, or no such setting: both end with an error.
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
