"""The bytes that each token adds to a text, so that text can be joined token by token.

A tokenizer with byte fallback spells a character that it has no piece for by one token per byte.
Its own decoder looks at whole runs of such tokens, and shows a whole run as U+FFFD if its end is
incomplete; joined bytes show what is there.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sentencepiece

REPLACEMENT = "\ufffd"
# Stands for a space inside tokens.
SPACE_MARK = "\u2581"


class Spelling:
    """What each token adds to a text.

    spell: of an id, the bytes that it adds inside a text, and at its start, where some tokenizers
    leave a space out. greedy: the start lasts until there is any text; else one token with bytes
    ends it.
    """

    def __init__(self, spell: Callable[[int], tuple[bytes, bytes]], greedy: bool = False):
        self._spell = functools.lru_cache(maxsize=None)(spell)
        self._greedy = greedy

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, with U+FFFD for bytes that form no character."""
        parts, at_start, rest = [], True, iter(ids)
        for token in rest:
            added, at_start = self.add(token, at_start)
            parts.append(added)
            if not at_start:
                break
        parts += [self._spell(token)[0] for token in rest]
        return b"".join(parts).decode(errors="replace")

    def add(self, token: int, at_start: bool) -> tuple[bytes, bool]:
        """The bytes that a token adds, and whether what follows is still at the start."""
        inside, first = self._spell(token)
        if not at_start:
            return inside, False
        return first, not inside or (self._greedy and not first)

    def starts_after(self, ids: Iterable[int]) -> bool:
        """Whether what follows these ids is at the start of a text."""
        at_start = True
        for token in ids:
            if not at_start:
                break
            _, at_start = self.add(token, at_start)
        return at_start


def sentencepiece_spelling(
    processor: sentencepiece.SentencePieceProcessor, hidden: frozenset[int]
) -> Spelling:
    """That of a SentencePiece model, which may begin texts with a space of its own.

    hidden: ids that add no text.
    """
    size, unknown = processor.get_piece_size(), processor.unk_id()
    pieces = (processor.id_to_piece(number) for number in range(size))
    example = next((piece for piece in pieces if len(piece) > 1 and piece[0] == SPACE_MARK), None)
    strips = greedy = False
    if example is not None:
        alone = processor.decode([example])
        strips = not alone.startswith(" ")
        # A model that removes extra spaces leaves out all those at the start.
        greedy = strips and processor.decode([SPACE_MARK, example]) == alone

    def spell(token: int) -> tuple[bytes, bytes]:
        if not 0 <= token < size:
            return (REPLACEMENT.encode(),) * 2
        if token in hidden or processor.is_control(token):
            return b"", b""
        if processor.is_byte(token):
            return (bytes([int(processor.id_to_piece(token)[3:5], 16)]),) * 2
        if token == unknown:
            return (processor.decode([token]).encode(),) * 2
        piece = processor.id_to_piece(token)
        first = piece.removeprefix(SPACE_MARK) if strips else piece
        return piece.replace(SPACE_MARK, " ").encode(), first.replace(SPACE_MARK, " ").encode()

    return Spelling(spell, greedy)


def byte_spelling() -> Spelling:
    """That of ids that are bytes; higher ones, bos and eos, add nothing."""

    def spell(token: int) -> tuple[bytes, bytes]:
        if not 0 <= token < 258:
            return (REPLACEMENT.encode(),) * 2
        return (bytes([token]) if token < 256 else b"",) * 2

    return Spelling(spell)


def hf_spelling(
    decoder: Mapping[str, Any] | None, token_of: Callable[[int], str | None], hidden: frozenset[int]
) -> Spelling | None:
    """That of a tokenizer.json; None if its decoder does more than to join what tokens stand for.

    Args:
        decoder: its entry of that name.
        token_of: the token of an id, None if there is none.
        hidden: ids that add no text.
    """
    steps = _steps(decoder)
    if steps is None:
        return None

    def spell(token: int) -> tuple[bytes, bytes]:
        if token in hidden:
            return b"", b""
        text = token_of(token)
        if text is None:
            return (REPLACEMENT.encode(),) * 2
        inside = first = text
        for step in steps:
            inside, first = step(inside, False), step(first, True)
        return _bytes(inside), _bytes(first)

    return Spelling(spell)


# A decoder's step: what stands for a token (text, then bytes), and whether at the start of a text.
_Step = Callable[[Any, bool], Any]


def _steps(decoder: Mapping[str, Any] | None) -> list[_Step] | None:
    if decoder is None:
        return None
    entries = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [entry["type"] for entry in entries]
    if kinds == ["ByteLevel"]:
        return [_byte_level]
    if kinds == ["Metaspace"]:
        return [functools.partial(_metaspace, entries[0])]
    steps: list[_Step] = []
    for index, entry in enumerate(entries):
        if (
            entry["type"] == "Replace"
            and "String" in entry["pattern"]
            and "Fuse" not in kinds[:index]
        ):
            old, new = entry["pattern"]["String"], entry["content"]
            steps.append(functools.partial(_replace, old, new))
        elif entry["type"] == "ByteFallback":
            steps.append(_byte_fallback)
        elif entry["type"] == "Strip" and "Fuse" in kinds[:index]:
            # What is stripped before tokens are joined, or at the end, is not known in a stream.
            if entry["stop"] or entry["start"] > 1 or kinds.count("Strip") > 1:
                return None
            if entry["start"]:
                steps.append(functools.partial(_strip, entry["content"].encode()))
        elif entry["type"] != "Fuse":
            return None
    return steps


def _replace(old: str, new: str, text: Any, _: bool) -> Any:
    return text.replace(old, new) if isinstance(text, str) else text


def _byte_fallback(text: Any, _: bool) -> Any:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes([int(text[3:5], 16)])
        except ValueError:
            return text
    return text


def _strip(content: bytes, text: Any, start: bool) -> Any:
    return _bytes(text).removeprefix(content) if start else text


def _metaspace(entry: Mapping[str, Any], text: str, start: bool) -> str:
    keeps = entry.get("prepend_scheme", "always") == "never"
    return text.replace(entry["replacement"], "" if start and not keeps else " ")


def _byte_level(text: str, _: bool) -> bytes:
    table = _byte_of_character()
    try:
        return bytes(table[character] for character in text)
    except KeyError:
        # An added token is text as it is.
        return text.encode()


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's: bytes that print stand for themselves, the others for characters from U+0100 on."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printing]
    table = {chr(value): value for value in printing}
    return table | {chr(256 + index): value for index, value in enumerate(others)}


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()
