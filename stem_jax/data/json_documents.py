"""The records of JSON files: an object on each line, or an array of objects."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stem_jax.byte_order_mark import after_marks
from stem_jax.data.packing import read_chunks
from stem_jax.errors import BadRecord, InputError
from stem_jax.files import parse_json

_SPACE = b" \t\r\n"
# What can end an element or hide its end.
_MARKS = re.compile(rb'\\.|["\[\]{},]', re.DOTALL)


def read_json_lines(path: Path) -> Iterator[tuple[Any, str] | BadRecord]:
    """(value, `file:line`) of each line that is not blank, or why it has none."""
    offset = 0
    for number, raw in enumerate(_read_lines(path), start=1):
        where = f"{path}:{number}"
        # Files that were joined bring their marks along.
        begin = after_marks(raw)
        line = raw[begin:]
        if line.strip(_SPACE):
            yield _parse(line, where, offset + begin, "put one object on each line")
        offset += len(raw)


def read_json_array(path: Path) -> Iterator[tuple[Any, str] | BadRecord]:
    """(value, `file[index]`) of each element of an array, or why it has none; one at a time.

    Raises InputError for a file that is no array, or ends inside of it.
    """
    for index, (raw, offset) in enumerate(_elements(path)):
        yield _parse(raw, f"{path}[{index}]", offset, "correct it")


def _parse(raw: bytes, where: str, offset: int, remedy: str) -> tuple[Any, str] | BadRecord:
    try:
        # Constants: NaN stands in the scores of real corpora, beside the text.
        text = decode(raw, where, offset)
        return parse_json(text, where, remedy, constants=True), where
    except InputError as error:
        return BadRecord(str(error), where)


def decode(raw: bytes, where: str, offset: int) -> str:
    """The text of some bytes. offset: of the first one in its file, for messages.

    Raises BadRecord for a NUL byte, or bytes that are not UTF-8.
    """
    nul = raw.find(b"\0")
    if nul >= 0:
        raise BadRecord(
            f"{where} is not text: NUL byte at byte {offset + nul}; give UTF-8 text files", where
        )
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"{where} is not UTF-8: byte 0x{raw[error.start]:02x} at byte {offset + error.start};"
            " convert it to UTF-8",
            where,
        ) from error


def _read_lines(path: Path) -> Iterator[bytes]:
    """Lines with their newline."""
    parts: list[bytes] = []
    for chunk in read_chunks(path):
        lines = chunk.split(b"\n")
        for line in lines[:-1]:
            yield b"".join([*parts, line, b"\n"])
            parts = []
        parts.append(lines[-1])
    rest = b"".join(parts)
    if rest:
        yield rest


def _elements(path: Path) -> Iterator[tuple[bytes, int]]:
    """(bytes, offset in the file) of each element of an array, unparsed."""
    chunks = read_chunks(path)
    buffer, base = bytearray(), 0  # base: offset of the buffer in the file
    start = _array_start(path, buffer, chunks)
    at, depth, in_string, first = start, 0, False, True
    while True:
        for mark in _MARKS.finditer(buffer, at):
            at, token = mark.end(), mark[0]
            if token == b'"':
                in_string = not in_string
            elif in_string or token[:1] == b"\\":
                continue
            elif token in b"[{":
                depth += 1
            elif depth and token in b"]}":
                depth -= 1
            elif not depth:
                element = bytes(buffer[start : mark.start()])
                last = token == b"]"
                if not (first and last and not element.strip(_SPACE)):
                    yield element, base + start
                first, start = False, at
                if last:
                    _check_end(path, bytes(buffer[at:]), chunks)
                    return
        # What was read of an unfinished element is not looked at again, but for half an escape.
        at = len(buffer) - (1 if buffer[at:].endswith(b"\\") else 0)
        chunk = next(chunks, None)
        if chunk is None:
            raise InputError(
                f"input file {path} ends inside its JSON array: fetch or write it again"
            )
        del buffer[:start]
        base, at, start = base + start, at - start, 0
        buffer += chunk


def _array_start(path: Path, buffer: bytearray, chunks: Iterator[bytes]) -> int:
    for chunk in chunks:
        buffer += chunk
        rest = buffer[after_marks(buffer) :].lstrip(_SPACE)
        if rest:
            if not rest.startswith(b"["):
                raise InputError(
                    f"input file {path} is no JSON array: set --format (data.format) to jsonl if"
                    " it has an object on each line"
                )
            return len(buffer) - len(rest) + 1
    return len(buffer)


def _check_end(path: Path, rest: bytes, chunks: Iterator[bytes]) -> None:
    while True:
        if rest.strip(_SPACE):
            raise InputError(
                f"input file {path} goes on after its JSON array: set --format (data.format) to"
                " jsonl if it has a value on each line"
            )
        following = next(chunks, None)
        if following is None:
            return
        rest = following
