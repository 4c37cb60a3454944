"""How much of a text its tokens stand for.

A tokenizer without byte fallback drops what it cannot spell, or puts an unknown token there. Bits
per byte count the whole text, and look the better the less of it a model has to predict.
"""

import dataclasses
import functools
import unicodedata
from collections import Counter
from typing import Any

from stem_jax.data.spelling import SPACE_MARK
from stem_jax.data.tokenizer_kinds import Tokenizer

# A change of case, width or spaces that is rarer than this is not worth a word.
_CHANGED_SHARE = 1e-3


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Sums over texts, in UTF-8 bytes.

    text: that was looked at. left_out: of characters that no token stands for. changed: of those
    that are there in another form: case, width, accents, spaces. example: the first that was left
    out.
    """

    text: int = 0
    left_out: int = 0
    changed: int = 0
    example: str = ""

    def __add__(self, other: "Coverage") -> "Coverage":
        return Coverage(
            self.text + other.text,
            self.left_out + other.left_out,
            self.changed + other.changed,
            self.example or other.example,
        )

    def record(self) -> dict[str, Any]:
        """Shares of the text, as a store's meta.json has them; empty where all is there."""
        found: dict[str, Any] = {}
        if self.changed > _CHANGED_SHARE * self.text:
            found["changed"] = self.changed / self.text
        if self.left_out:
            found |= {"left_out": self.left_out / self.text, "left_out_example": self.example}
        return found


def coverage_of(tokenizer: Tokenizer, text: str, ids: list[int]) -> Coverage:
    """That of one text. ids: of it, without bos and eos."""
    kept = tokenizer.kept(text, ids)
    size = len(text.encode())
    if kept == text:
        return Coverage(size)
    given, there = Counter(text), Counter(kept)
    missing, other = given - there, Counter[str]()
    for character, n in (there - given).items():
        for part in _plain(character):
            other[part] += n
    changed = 0
    for character, n in missing.items():
        # In another form, or white space, which many tokenizers strip.
        needed = Counter(_plain(character))
        found = min([n, *(other[part] // count for part, count in needed.items())])
        other.subtract({part: count * found for part, count in needed.items()})
        missing[character] -= found
        changed += found * len(character.encode())
    gone = +missing
    left_out = sum(n * len(character.encode()) for character, n in gone.items())
    example = next((character for character in text if character in gone), "")
    return Coverage(size, left_out, changed, example)


def left_out_note(share: float) -> str:
    """In one clause what every figure in bits per byte must be read with; "" for no such share."""
    return f"the tokens leave out {_percent(share)} of the text's bytes" if share else ""


def coverage_note(left_out: float, example: str, changed: float = 0.0) -> str:
    """The same with an example and a remedy; "" where nothing is left out or changed."""
    if left_out:
        also = f", and change {_percent(changed)}" if changed else ""
        return (
            f"{left_out_note(left_out)}, first {example!r}{also}: bits per byte count the whole"
            " text and look better than they are; take a tokenizer with byte fallback or all 256"
            " bytes"
        )
    if changed:
        return (
            f"the tokens change {_percent(changed)} of the text's bytes (case, width, accents or"
            " spaces): generated text has them in that form"
        )
    return ""


# Of nothing yet.
UNSEEN = Coverage()


@functools.cache
def _plain(character: str) -> str:
    """What is left of a character without case, width, accents; nothing of white space."""
    if character == SPACE_MARK:
        return ""
    parts = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold())
    return "".join(c for c in parts if not c.isspace() and unicodedata.category(c)[0] not in "CM")


def _percent(share: float) -> str:
    if share >= 0.1:
        return f"{share:.0%}"
    return f"{100 * share:.2g}%" if share >= 1e-6 else "less than 0.0001%"
