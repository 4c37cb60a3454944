"""The mark that some programs write before a text: where it is no part of the text.

Files that were joined (`cat a.txt b.txt`) and texts that were copied out of files bring their marks
along, so one stands at the start of a text, or of a line in the middle of it. There it means
nothing else: what the same character did inside a line, keep two words from being parted (zero
width no-break space), it cannot do after a line's end. Inside a line it is text.
"""

import re

MARK = "\ufeff"
_MARK_BYTES = MARK.encode()
_AT_LINE_STARTS = re.compile(rf"(?:\A|(?<=[\n\r])){MARK}+")


def after_marks(raw: bytes | bytearray) -> int:
    """How many bytes of marks some UTF-8 begins with."""
    end = 0
    while raw.startswith(_MARK_BYTES, end):
        end += len(_MARK_BYTES)
    return end


def without_marks(text: str) -> str:
    """A text without the marks at its start and at the starts of its lines."""
    return _AT_LINE_STARTS.sub("", text) if MARK in text else text
