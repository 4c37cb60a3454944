"""Documents from files: plain text, JSON lines, JSON arrays and Parquet; packed ones, too."""

import dataclasses
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stem_jax.byte_order_mark import without_marks
from stem_jax.data.bad_records import BadRecords
from stem_jax.data.conversations import conversation_text
from stem_jax.data.formats import AS_FOUND, CHAT, Reading, format_of
from stem_jax.data.json_documents import decode, read_json_array, read_json_lines
from stem_jax.data.packing import one_line, read_chunks
from stem_jax.data.parquet_documents import read_parquet
from stem_jax.data.remote_sources import text_files
from stem_jax.errors import BadRecord, InputError
from stem_jax.storage import is_remote, place

# As JSON has it; other values stand in Parquet alone.
_NAMES = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
}


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and where it came from: `file`, `file:line`, `file[index]` or `file#row`.

    Byte order marks, of its file or of those that were joined in it, are no text. That of a
    conversation is what `conversation_text` makes.
    """

    text: str
    origin: str


def read_documents(
    files: Sequence[Path], reading: Reading = AS_FOUND, bad: BadRecords | None = None
) -> Iterator[Document]:
    """Yields the documents of some files, in their order.

    bad: takes the records that cannot be used; None: the first one is raised.
    Raises InputError for empty, binary, truncated or malformed files, with the file and the line,
    row or byte offset.
    """
    bad = bad or BadRecords()
    for path in files:
        for found in _read_file(path, reading):
            if isinstance(found, BadRecord):
                bad.add(found)
            else:
                yield found


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that match, for each pattern in turn sorted by path; each file once.

    patterns: paths or globs (`**` crosses folders), also of buckets, of which copies are returned.
        A file that several names lead to, by a link or by `./`, is taken by the first.
    Raises InputError for a pattern without a match.
    """
    found: dict[str, Path] = {}
    for given in patterns:
        path = place(given, "input")
        if is_remote(path):
            copies = text_files(path)
            if not copies:
                raise InputError(f"input {given!r} matches no object: check the name, quote globs")
            found |= {str(copy): copy for copy in copies}
            continue
        pattern = str(path)
        matches = {match for match in glob.glob(pattern, recursive=True) if Path(match).is_file()}
        if Path(pattern).is_file():  # a name with [ or * in it
            matches.add(pattern)
        if Path(pattern).is_dir():
            raise InputError(
                f"input {given!r} is a folder: give a pattern of files, such as {given}/*.txt"
            )
        if not matches:
            raise InputError(f"input {given!r} matches no file: check the path, quote globs")
        for match in sorted(matches):
            found.setdefault(os.path.realpath(match), Path(match))
    return list(found.values())


def _read_file(path: Path, reading: Reading) -> Iterator[Document | BadRecord]:
    try:
        empty = True
        for found in _read_records(path, reading) if path.stat().st_size else ():
            empty = False
            yield found
        if empty:
            place = f"input file {path}"
            yield BadRecord(f"{place} is empty: remove it or give another file", str(path))
    except OSError as error:
        raise InputError(f"input file {path} cannot be read: {one_line(error)}") from error


def _read_records(path: Path, reading: Reading) -> Iterator[Document | BadRecord]:
    """The documents of a file; none of an empty one."""
    kind = format_of(path, reading)
    if kind == "text":
        yield from _read_plain(path)
    elif kind == "parquet":
        for found in read_parquet(path, reading.text_field):
            yield found if isinstance(found, BadRecord) else _document(*found, reading)
    else:
        for found in (read_json_array if kind == "json" else read_json_lines)(path):
            yield found if isinstance(found, BadRecord) else _document_of(*found, reading)


def _read_plain(path: Path) -> Iterator[Document | BadRecord]:
    raw = b"".join(read_chunks(path))
    try:
        text = without_marks(decode(raw, f"input file {path}", offset=0))
    except BadRecord as error:
        yield error
        return
    if text:
        yield Document(text, str(path))


def _document_of(record: Any, where: str, reading: Reading) -> Document | BadRecord:
    if reading.format == CHAT:
        try:
            return Document(conversation_text(record), where)
        except BadRecord as error:
            return BadRecord(f"{where}: {error}", where)
    if not isinstance(record, dict):
        return BadRecord(
            f"{where} is {_named(record)}: put one object on each line, or in each place of an"
            " array",
            where,
        )
    if reading.text_field not in record:
        return BadRecord(
            f"{where} has no field {reading.text_field!r}: set --text-field (data.text_field) to"
            f" one of {', '.join(map(repr, record)) or 'its fields (it has none)'}",
            where,
        )
    return _document(record[reading.text_field], where, reading)


def _document(text: Any, where: str, reading: Reading) -> Document | BadRecord:
    field = reading.text_field
    if not isinstance(text, str):
        return BadRecord(
            f"{where}: field {field!r} is {_named(text)}, not a string: drop the record"
            " or set --text-field (data.text_field) to another field",
            where,
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return BadRecord(
            f"{where}: field {field!r} holds the lone surrogate {text[error.start]!r} at"
            f" character {error.start}: replace it by U+FFFD",
            where,
        )
    return Document(without_marks(text), where)


def _named(value: Any) -> str:
    return _NAMES.get(type(value)) or f"of type {type(value).__name__}"
