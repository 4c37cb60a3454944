"""One completion of a request as it grows: text that is certain, and why it ended."""

import dataclasses
from collections.abc import Sequence

from stem_jax.data.tokenizer import Tokenizer
from stem_jax.generation.completion import TextStream
from stem_jax.serving.request import Step
from stem_jax.serving.stop_text import StopText
from stem_jax.serving.token_text import ShownStep, TokenTexts


@dataclasses.dataclass(frozen=True)
class TextPiece:
    """What a step adds to a choice.

    choice: its index in the request. text: often empty within a character of several bytes, or
    where a stop string may have begun. steps: the tokens of this text, if they are asked for.
    finish: "stop" (a stop id or stop string), "length" (as many tokens as asked for, or the
    context is full); None as long as more follows.
    """

    choice: int
    text: str
    steps: tuple[ShownStep, ...]
    finish: str | None


class Choice:
    """One completion. tokens: how many there are so far, one that ends it included."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stops: Sequence[str],
        texts: TokenTexts | None,
    ):
        """Args:
        stops: texts before which it ends.
        texts: to show its tokens; None if nobody asks for them.
        """
        self.index = index
        self.tokens = 0
        self.finish: str | None = None
        self._stream = TextStream(tokenizer, prompt_ids)
        self._stop = StopText(stops)
        self._texts = texts
        self._length = self._given = 0
        self._waiting: list[ShownStep] = []

    def push(self, step: Step) -> TextPiece:
        """Takes a step that has a token."""
        self.tokens += 1
        text = ""
        if step.finish != "stop":
            if self._texts is not None:
                self._waiting.append(self._texts.step(step, self._length))
            text = self._stream.push(step.token)
        if step.finish is not None:
            text += self._stream.flush()
        self._length += len(text)
        certain = self._stop.push(text)
        self.finish = step.finish
        if self._stop.found:
            self.finish = "stop"
        elif step.finish is not None:
            certain += self._stop.flush()
        self._given += len(certain)
        return TextPiece(self.index, certain, self._shown(), self.finish)

    def _shown(self) -> tuple[ShownStep, ...]:
        """The tokens of the text that is out: of one that is cut by a stop string, none behind."""
        all_out = self._given == self._length
        shown = tuple(step for step in self._waiting if all_out or step.offset < self._given)
        self._waiting = [] if self.finish else self._waiting[len(shown) :]
        return shown
