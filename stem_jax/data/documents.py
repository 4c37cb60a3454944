"""Documents from files: plain text, JSONL and Parquet, the first two also as .gz and .zst."""

import dataclasses
import glob
import gzip
import importlib
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from stem_jax.errors import InputError

_CHUNK_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and where it came from: `file`, `file:line` (JSONL) or `file#row` (Parquet)."""

    text: str
    origin: str


def read_documents(patterns: Sequence[str], text_field: str = "text") -> Iterator[Document]:
    """Yields the documents of all files that match, sorted by path, each file once.

    patterns: paths or globs (`**` crosses folders). The name tells the format: `.jsonl` (one object
        per line), `.parquet`, anything else is plain text, one document per file; a further `.gz`
        or `.zst` is unpacked.
    text_field: key of a JSONL object, or column of a Parquet file, that holds the text.
    Raises InputError when nothing matches, and for empty, binary, truncated or malformed files,
    with the file and the line, row or byte offset.
    """
    for path in find_files(patterns):
        yield from _read_file(path, text_field)


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that match, sorted by path. Raises InputError for a pattern without a match."""
    found: set[str] = set()
    for pattern in patterns:
        matches = {match for match in glob.glob(pattern, recursive=True) if Path(match).is_file()}
        if Path(pattern).is_file():  # a name with [ or * in it
            matches.add(pattern)
        if not matches:
            raise InputError(f"input {pattern!r} matches no file: check the path, quote globs")
        found |= matches
    return [Path(name) for name in sorted(found)]


def _read_file(path: Path, text_field: str) -> Iterator[Document]:
    try:
        if path.stat().st_size == 0:
            raise InputError(f"input file {path} is empty: remove it or give another file")
        stem = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
        if path.suffix == ".parquet":
            yield from _read_parquet(path, text_field)
        elif stem.suffix == ".jsonl":
            yield from _read_jsonl(path, text_field)
        elif stem.suffix == ".parquet":
            raise InputError(f"input file {path}: unpack it, Parquet compresses by itself")
        else:
            yield Document(_read_plain(path), str(path))
    except OSError as error:
        raise InputError(f"input file {path} cannot be read: {_line(error)}") from error


def _read_plain(path: Path) -> str:
    raw = b"".join(_read_chunks(path)).removeprefix(_BYTE_ORDER_MARK)
    if not raw:
        raise InputError(f"input file {path} is empty: remove it or give another file")
    return _decode(raw, f"input file {path}", offset=0)


def _read_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    offset, empty = 0, True
    for number, raw in enumerate(_read_lines(path), start=1):
        where = f"{path}:{number}"
        line = _decode(raw, where, offset)
        offset += len(raw)
        if not line.strip():
            continue
        empty = False
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{where} is not a JSON object ({_line(error)}): put one object on each line"
            ) from error
        yield Document(_text_of(record, text_field, where), where)
    if empty:
        raise InputError(f"input file {path} is empty: remove it or give another file")


def _text_of(record: Any, text_field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise InputError(
            f"{where} holds a JSON {type(record).__name__}: put one object on each line"
        )
    if text_field not in record:
        raise InputError(
            f"{where} has no field {text_field!r}: set prepare's --text-field to one of"
            f" {', '.join(map(repr, record)) or 'its fields (it has none)'}"
        )
    return _checked_text(record[text_field], text_field, where)


def _checked_text(text: Any, text_field: str, where: str) -> str:
    if not isinstance(text, str):
        raise InputError(
            f"{where}: field {text_field!r} is a {type(text).__name__}, not a string: drop the"
            " record or set prepare's --text-field to another field"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: field {text_field!r} holds the lone surrogate {text[error.start]!r} at"
            f" character {error.start}: replace it by U+FFFD"
        ) from error
    return text


def _read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    _optional("pyarrow", f"input file {path}")
    arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                raise InputError(
                    f"input file {path} has no column {text_field!r}: set prepare's"
                    f" --text-field to one of {', '.join(map(repr, columns))}"
                )
            if file.metadata.num_rows == 0:
                raise InputError(f"input file {path} is empty: remove it or give another file")
            row = 0
            for group in range(file.num_row_groups):
                batches = file.iter_batches(row_groups=[group], columns=[text_field])
                for text in (text for batch in batches for text in batch.column(0).to_pylist()):
                    where = f"{path}#{row}"
                    row += 1
                    yield Document(_checked_text(text, text_field, where), where)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"input file {path} is not a readable Parquet file ({_line(error)}): fetch it again"
        ) from error


def _read_lines(path: Path) -> Iterator[bytes]:
    """Lines with their newline, without a byte order mark."""
    parts: list[bytes] = []
    first = True
    for chunk in _read_chunks(path):
        lines = chunk.split(b"\n")
        for line in lines[:-1]:
            whole = b"".join([*parts, line, b"\n"])
            parts = []
            yield whole.removeprefix(_BYTE_ORDER_MARK) if first else whole
            first = False
        parts.append(lines[-1])
    rest = b"".join(parts)
    if rest:
        yield rest.removeprefix(_BYTE_ORDER_MARK) if first else rest


def _read_chunks(path: Path) -> Iterator[bytes]:
    """The unpacked bytes. Raises InputError for a truncated or corrupt archive."""
    try:
        if path.suffix == ".zst":
            yield from _unpack_zst(path)
            return
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except EOFError as error:
        raise _truncated(path) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"input file {path} is not a valid gzip file ({_line(error)}): fetch it again"
        ) from error


def _unpack_zst(path: Path) -> Iterator[bytes]:
    # The stream reader of zstandard ends silently at a cut frame; a decompressobj knows better.
    zstandard = _optional("zstandard", f"input file {path}")
    unpack = zstandard.ZstdDecompressor().decompressobj()
    complete = False
    with open(path, "rb") as file:
        while packed := file.read(_CHUNK_BYTES):
            while packed:
                if complete:
                    unpack = zstandard.ZstdDecompressor().decompressobj()
                try:
                    chunk = unpack.decompress(packed)
                except zstandard.ZstdError as error:
                    raise InputError(
                        f"input file {path} is not a valid zstd file ({_line(error)}): fetch it"
                        " again"
                    ) from error
                complete = unpack.eof
                packed = unpack.unused_data if complete else b""
                if chunk:
                    yield chunk
    if not complete:
        raise _truncated(path)


def _decode(raw: bytes, where: str, offset: int) -> str:
    nul = raw.find(b"\0")
    if nul >= 0:
        raise InputError(
            f"{where} is not text: NUL byte at byte {offset + nul}; give UTF-8 text files"
        )
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} is not UTF-8: byte 0x{raw[error.start]:02x} at byte {offset + error.start};"
            " convert it to UTF-8"
        ) from error


def _truncated(path: Path) -> InputError:
    return InputError(f"input file {path} is truncated: fetch or compress it again")


def _optional(module: str, purpose: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{purpose} needs the {module} package: pip install {module}") from error


def _line(error: Exception) -> str:
    """The message of another library, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
