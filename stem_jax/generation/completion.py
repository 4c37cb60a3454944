"""A completion as it grows: its tokens, its text, and why it stopped."""

import codecs
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from stem_jax.byte_order_mark import without_marks
from stem_jax.data.spelling import REPLACEMENT
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.errors import InputError

# The first three bytes of a character of four; a decoder may show each as one replacement.
_LONGEST_INCOMPLETE = 3


@dataclasses.dataclass(frozen=True)
class Completion:
    """A completed prompt.

    tokens: new ids, but a stop id. text: what they add to the prompt. stop: "eos" (or
    another id that ends completions), "length" (as many as asked for) or
    "context" (prompt and completion fill the context). tokens_per_second: rate after the first
    token, which waits for compilation; None with fewer than two.
    """

    prompt: str
    text: str
    tokens: list[int]
    stop: str
    tokens_per_second: float | None


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one per line; empty lines are none, byte order marks no text.

    Raises:
        InputError: the file cannot be read, or is not UTF-8.
    """
    try:
        lines = without_marks(Path(path).read_text("utf-8")).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"prompt file {path} cannot be read ({error}); give a UTF-8 file"
        ) from error
    return [line for line in lines if line]


def special_notes(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[str]:
    """What to say of prompts that hold the text of a special token, which is read as text."""
    notes = []
    for number, prompt in enumerate(prompts, start=1):
        found = sorted(text for text in tokenizer.special_texts if text in prompt)
        if found:
            listed = ", ".join(map(repr, found))
            notes.append(
                f"prompt {number} holds {listed}, read as text like any other; "
                "--special-tokens=special reads it as the special token"
            )
    return notes


class Progress:
    """One sequence on its way to a Completion."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        ids: Sequence[int],
        max_new_tokens: int,
        context: int,
    ):
        self._prompt = prompt
        self._stop_ids = tokenizer.special.stop_ids
        self._stop = "length" if len(ids) + max_new_tokens <= context else "context"
        self._limit = min(max_new_tokens, context - len(ids))
        self._stream = TextStream(tokenizer, ids)
        self._tokens: list[int] = []
        self._pieces: list[str] = []
        self._times: list[float] = []

    def push(self, token: int) -> str:
        """Takes a token and returns the text that is now certain."""
        self._times.append(time.perf_counter())
        if token in self._stop_ids:
            self._stop = "eos"
            piece = self._stream.flush()
        else:
            self._tokens.append(token)
            piece = self._stream.push(token)
            if len(self._tokens) == self._limit:
                piece += self._stream.flush()
        self._pieces.append(piece)
        return piece

    def completion(self) -> Completion:
        """What there is so far."""
        steps = len(self._times) - 1
        rate = steps / (self._times[-1] - self._times[0]) if steps > 0 else None
        return Completion(self._prompt, "".join(self._pieces), self._tokens, self._stop, rate)


class TextStream:
    """Turns tokens into pieces of text whose concatenation is what they add to the prompt.

    The bytes of the tokens are joined, and a character goes out as soon as its last byte is there;
    bytes that form none are U+FFFD. Where a tokenizer's text is more than its bytes, a short window
    of ids is decoded again for each token. It begins one token before the new text, because some
    decoders drop a space at the start of what they are given.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._spelling = tokenizer.spelling
        if self._spelling is not None:
            self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
            self._at_start = self._spelling.starts_after(prompt)
        else:
            self._window = list(prompt[-1:])
            self._done = len(tokenizer.decode(self._window))

    def push(self, token: int) -> str:
        """The text that this token completes, often empty within a character of several bytes."""
        if self._spelling is not None:
            added, self._at_start = self._spelling.add(token, self._at_start)
            return self._decoder.decode(added)
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        trailing = len(text) - len(text.rstrip(REPLACEMENT))
        stable = len(text) - min(trailing, _LONGEST_INCOMPLETE)
        piece = text[self._done : stable]
        self._done = max(self._done, stable)
        if trailing == 0:
            self._window = [token]
            self._done = len(self._tokenizer.decode(self._window))
        return piece

    def flush(self) -> str:
        """What is still held back, with U+FFFD for the incomplete character."""
        if self._spelling is not None:
            return self._decoder.decode(b"", final=True)
        text = self._tokenizer.decode(self._window)
        piece, self._done = text[self._done :], len(text)
        return piece
