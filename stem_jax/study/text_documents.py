"""What of a package's files is text, prose or code, and which files are neither."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import PurePosixPath

from stem_jax.byte_order_mark import without_marks

# What the rules are, for whoever reads a prepared folder.
RULES = {
    "prose": "files .rst .md .txt of at least 500 characters, of which at least 98 % are"
    " ASCII and at least 65 % of the words plain (letters alone); runs of spaces are one space,"
    " indentation is left out, runs of one punctuation mark are three of it, paragraphs that"
    " license the file are left out",
    "code": "files .py outside folders of tests, of at least 500 characters, of which at least"
    " 98 % are ASCII and at most 10 % digits, no line over 500 characters; four spaces of"
    " indentation are a tab, comments before the first line of code are left out",
}
_MIN_CHARS = 500
_MIN_ASCII = 0.98
_MIN_PLAIN_WORDS = 0.65
_MAX_DIGITS = 0.10
_MAX_LINE = 500
_PROSE_FILES = (".rst", ".md", ".txt")
_NO_PROSE = re.compile(r"(?i)^(licen[cs]e|copying|copyright|authors|contributors|requirements)")
_TEST_FOLDERS = frozenset({"test", "tests", "testing", "testsuite"})
_PLAIN_WORD = re.compile(r"[(\"'`*]*[A-Za-z][a-z]*(?:['-][a-z]+)*[)\"'`*]*[.,;:!?]*")
_LICENSING = re.compile(r"(?i)licensed under|apache\.org/licenses|without warrant|license at$")


@dataclasses.dataclass(frozen=True)
class TextDocument:
    """A document. package: its name. path: in the package. split: that of the package."""

    package: str
    path: str
    split: str
    text: str


def text_of(kind: str, path: str, raw: bytes) -> str | None:
    """The text of a file as the study reads it; None if it is none of that kind (`RULES`)."""
    return _READERS[kind](PurePosixPath(path), raw)


def _prose(path: PurePosixPath, raw: bytes) -> str | None:
    if path.suffix not in _PROSE_FILES or _NO_PROSE.match(path.name):
        return None
    text = _decoded(raw)
    if text is None:
        return None
    text = re.sub(r"[ \t\f\v]+", " ", text)
    text = re.sub(r"^ | $", "", text, flags=re.MULTILINE)
    text = re.sub(r"([^\w\s])\1{3,}", r"\1\1\1", text)
    paragraphs = (p for p in re.split(r"\n{2,}", text.strip()) if not _LICENSING.search(p))
    text = "\n\n".join(paragraphs) + "\n"
    words = text.split()
    plain = sum(_PLAIN_WORD.fullmatch(word) is not None for word in words)
    return text if _whole(text) and plain >= _MIN_PLAIN_WORDS * len(words) else None


def _code(path: PurePosixPath, raw: bytes) -> str | None:
    if path.suffix != ".py" or _TEST_FOLDERS.intersection(path.parts[:-1]):
        return None
    text = _decoded(raw)
    if text is None:
        return None
    lines = [_tabbed(line.rstrip()) for line in text.split("\n")]
    while lines and (not lines[0] or lines[0].startswith("#")):
        del lines[0]
    text = "\n".join(lines).rstrip() + "\n"
    digits = sum(map(str.isdigit, text))
    readable = max(map(len, lines), default=0) <= _MAX_LINE and digits <= _MAX_DIGITS * len(text)
    return text if _whole(text) and readable else None


def _tabbed(line: str) -> str:
    """Each four spaces at the beginning are a tab: with small vocabularies a space is a token."""
    indentation = len(line) - len(line.lstrip(" "))
    return "\t" * (indentation // 4) + line[indentation // 4 * 4 :]


def _decoded(raw: bytes) -> str | None:
    try:
        text = without_marks(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text.replace("\r\n", "\n").replace("\r", "\n")


def _whole(text: str) -> bool:
    ascii_chars = len(text.encode("ascii", "ignore"))
    return len(text) >= _MIN_CHARS and ascii_chars >= _MIN_ASCII * len(text)


_READERS: dict[str, Callable[[PurePosixPath, bytes], str | None]] = {
    "prose": _prose,
    "code": _code,
}
