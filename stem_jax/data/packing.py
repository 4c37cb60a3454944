"""The unpacked bytes of a file: gzip, zstd, bzip2 and xz, known by what it begins with."""

import bz2
import contextlib
import gzip
import importlib
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

from stem_jax.errors import InputError

_CHUNK_BYTES = 1 << 20
_SUFFIXES = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".bz2": "bzip2",
    ".xz": "xz",
}
# None of them begins a text but the one of bzip2, which is ten bytes long for that reason. What
# pzstd writes begins with a frame to be skipped.
_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
}
# What is left of an archive that was cut within its first bytes.
_MARKS = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\x00")
# Of `zstd --ultra --long=31`; a frame says how much it needs, and only that is taken.
_LONGEST_WINDOW = 1 << 31


def split_name(path: Path) -> tuple[str, str | None]:
    """The name of a file in small letters without the suffix of a packing, and that packing."""
    name = PurePath(path.name.lower())
    packing = _SUFFIXES.get(name.suffix)
    return (name.stem if packing else name.name), packing


def read_chunks(path: Path) -> Iterator[bytes]:
    """The unpacked bytes of a file, about a megabyte at a time.

    Raises InputError for a truncated or corrupt archive, and for a file that has the name of an
    archive but is none.
    """
    packing = _packing_of(path)
    with _refusals(path, packing):
        if packing == "zstd":
            yield from _unpack_zstd(path)
            return
        openers: dict[str | None, Callable[..., Any]]
        openers = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
        opener = openers.get(packing, open)
        with opener(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk


def _packing_of(path: Path) -> str | None:
    with open(path, "rb") as file:
        start = file.read(16)
    for packing, magic in _MAGIC.items():
        if magic.match(start):
            return packing
    name, named = split_name(path)
    if named is None:
        return None
    if any(start[: len(mark)] == mark[: len(start)] for mark in _MARKS) and len(start) < 10:
        raise _truncated(path)
    raise InputError(
        f"input file {path} is not a valid {named} file (it begins with {start[:8]!r}): if it was"
        f" unpacked on its way, name it {name}, else fetch it again"
    )


@contextlib.contextmanager
def _refusals(path: Path, packing: str | None) -> Iterator[None]:
    """What the readers of archives raise, as an InputError."""
    try:
        yield
    except EOFError as error:
        raise _truncated(path) from error
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise _invalid(path, packing, error) from error
    except OSError as error:
        # What bz2 raises for damage has no number.
        if packing != "bzip2" or error.errno is not None:
            raise
        raise _invalid(path, packing, error) from error


def _unpack_zstd(path: Path) -> Iterator[bytes]:
    # The stream reader of zstandard ends silently at a cut frame; a decompressobj knows better.
    zstandard = optional("zstandard", f"input file {path}")
    unpacker = zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW)
    unpack = unpacker.decompressobj()
    complete = False
    with open(path, "rb") as file:
        while packed := file.read(_CHUNK_BYTES):
            while packed:
                if complete:
                    unpack = unpacker.decompressobj()
                try:
                    chunk = unpack.decompress(packed)
                except zstandard.ZstdError as error:
                    if "ictionary" in str(error):
                        raise InputError(
                            f"input file {path} needs the dictionary it was packed with: pack it"
                            " again without one"
                        ) from error
                    raise _invalid(path, "zstd", error) from error
                complete = unpack.eof
                packed = unpack.unused_data if complete else b""
                if chunk:
                    yield chunk
    if not complete:
        raise _truncated(path)


def _invalid(path: Path, packing: str | None, error: Exception) -> InputError:
    return InputError(
        f"input file {path} is not a valid {packing} file ({one_line(error)}): fetch it again"
    )


def _truncated(path: Path) -> InputError:
    return InputError(f"input file {path} is truncated: fetch or compress it again")


def optional(module: str, purpose: str) -> ModuleType:
    """A package that only some inputs need. Raises InputError without it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{purpose} needs the {module} package: pip install {module}") from error


def one_line(error: Exception) -> str:
    """The message of another library, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
