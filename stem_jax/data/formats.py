"""What format a file of text has: by its name and by what it begins with, or refused."""

import dataclasses
import re
from pathlib import Path, PurePath

from stem_jax.byte_order_mark import after_marks
from stem_jax.data.packing import read_chunks, split_name
from stem_jax.errors import InputError

# text: a file is a document; jsonl: an object on each line; json: an array of objects.
FORMATS = ("auto", "text", "jsonl", "json", "parquet")
# Of conversations, which `prepare` alone reads: objects on lines or in an array.
CHAT = "chat"

_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson", ".jsonlines")
_PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")
_TABLE_SUFFIXES = (".csv", ".tsv", ".xls", ".xlsx", ".arrow", ".feather", ".orc", ".avro")
# Prose, markup and programs; a file without a suffix is text, too.
_TEXT_SUFFIXES = frozenset(
    f".{name}"
    for name in """
    txt text md markdown mdx rst adoc org tex bib log srt vtt html htm css scss
    py pyi pyx c h cc cpp cxx hpp hh cu cuh m mm java kt kts scala groovy go rs swift
    js mjs cjs jsx ts tsx vue rb php pl pm lua r jl hs ml mli fs cs vb ex exs erl clj lisp el scm
    sh bash zsh fish ps1 bat sql proto graphql thrift toml yaml yml ini cfg conf properties cmake mk
    gradle tf dockerfile diff patch po asm s f f90 f95 for pas d nim zig v sv vhd vhdl sol
    """.split()
)
_PARQUET_MAGIC = b"PAR1"
# What no text begins with, and what to do about it.
_OTHER_MAGIC = {
    b"PK\x03\x04": "is a zip archive: unpack it",
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive: unpack it",
    b"Rar!\x1a\x07": "is a RAR archive: unpack it",
    b"\x04\x22\x4d\x18": "is packed with lz4: unpack it, or pack it with zstd",
    b"\x1f\x9d": "is packed with compress: unpack it, or pack it with gzip",
    b"ARROW1": "is an Arrow file: convert it to Parquet",
    b"%PDF-": "is a PDF: extract its text",
    b"\xff\xfe": "is UTF-16: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "is UTF-16: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
}
_TAR_MAGIC, _TAR_OFFSET = b"ustar", 257
# An object, or an array of them, begins: {"key": or [{"key":
_JSON_BEGINS = re.compile(rb'\s*(\[\s*)?\{\s*"(?:[^"\\]|\\.)*"\s*:')


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files of text are read.

    text_field: key of a JSON object, or column of a Parquet file, that holds the text.
    format: one of FORMATS, or CHAT; "auto" goes by name and content.
    """

    text_field: str = "text"
    format: str = "auto"

    def __post_init__(self):
        if self.format not in (*FORMATS, CHAT):
            raise InputError(f"format {self.format!r} is unknown: use one of {', '.join(FORMATS)}")


AS_FOUND = Reading()


def format_of(path: Path, reading: Reading) -> str:
    """The format of a file: one of FORMATS but "auto".

    Raises InputError for what is no text, and for a name or a beginning that leaves open what it
    is, with the flag that decides it.
    """
    if reading.format not in ("auto", CHAT):
        return reading.format
    name, packing = split_name(path)
    suffix = PurePath(name).suffix
    start = next(read_chunks(path), b"")
    start = start[after_marks(start) :]
    if reading.format == CHAT:
        if start.startswith(_PARQUET_MAGIC):
            raise InputError(f"input file {path} is Parquet: write its conversations as JSON lines")
        _check_kind(path, start)
        return "json" if start.lstrip()[:1] == b"[" else "jsonl"
    if suffix in _PARQUET_SUFFIXES or start.startswith(_PARQUET_MAGIC):
        if packing is not None:
            raise InputError(f"input file {path}: unpack it, Parquet compresses by itself")
        return "parquet"
    _check_kind(path, start)
    if suffix in _JSON_SUFFIXES:
        return "json" if start.lstrip()[:1] == b"[" else "jsonl"
    if suffix in _TABLE_SUFFIXES:
        raise InputError(
            f"input file {path}: {suffix} is not read; convert it to JSONL or Parquet, or set"
            " --format=text (data.format) to read the file as one document"
        )
    if suffix and suffix not in _TEXT_SUFFIXES:
        raise InputError(
            f"input file {path}: {suffix} is not known as text; set --format (data.format) to text"
            " (a file is a document), jsonl, json or parquet"
        )
    if _JSON_BEGINS.match(start):
        raise InputError(
            f"input file {path} begins as JSON, its name says otherwise: set --format"
            " (data.format) to jsonl (an object on each line), json (an array) or text"
        )
    return "text"


def was_read_as_text(path: Path) -> bool:
    """Whether versions that knew records by `.jsonl` and `.parquet` alone took a file for text.

    Stores that they made of it hold its braces and quotes.
    """
    before = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    name, _ = split_name(path)
    return before.suffix != ".jsonl" and PurePath(name).suffix in _JSON_SUFFIXES


def _check_kind(path: Path, start: bytes) -> None:
    for magic, advice in _OTHER_MAGIC.items():
        if start.startswith(magic):
            raise InputError(f"input file {path} {advice}")
    if start[_TAR_OFFSET : _TAR_OFFSET + len(_TAR_MAGIC)] == _TAR_MAGIC:
        raise InputError(f"input file {path} is a tar archive: unpack it")
