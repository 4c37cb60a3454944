"""How single tokens are shown where their probabilities are asked for."""

import dataclasses
import math

from stem_jax.data.spelling import REPLACEMENT
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.serving.api_error import ApiError
from stem_jax.serving.request import Step

# JSON has no infinity; OpenAI's API says it so.
_LEAST_LOGPROB = -9999.0


@dataclasses.dataclass(frozen=True)
class ShownToken:
    """A token as clients see it.

    text: of it alone; "bytes:\\\\x.." if its bytes form no text, its own name if it adds none.
    bytes: that it adds to a text. logprob: natural logarithm.
    """

    text: str
    bytes: tuple[int, ...]
    logprob: float


@dataclasses.dataclass(frozen=True)
class ShownStep(ShownToken):
    """A new token. offset: characters of the completion before it. top: the likeliest tokens."""

    offset: int
    top: tuple[ShownToken, ...]


class TokenTexts:
    """The tokens of a tokenizer as they are shown."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = {number: text for text, number in tokenizer.special_texts.items()}

    def token(self, token: int, logprob: float) -> ShownToken:
        """One token, alone. Raises ApiError for NaN, which JSON has not: the model is broken."""
        if math.isnan(logprob):
            raise ApiError("the model gives NaN, and no probabilities", status=500, code="nan")
        added = self._bytes(token)
        logprob = max(logprob, _LEAST_LOGPROB)
        if not added:
            return ShownToken(self._special.get(token, f"token_id:{token}"), (), logprob)
        try:
            text = added.decode()
        except UnicodeDecodeError:
            text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in added)
        return ShownToken(text, tuple(added), logprob)

    def step(self, step: Step, offset: int) -> ShownStep:
        """A step and its likeliest tokens; offset: see `ShownStep`."""
        own = self.token(step.token, step.logprob)
        top = tuple(self.token(token, logprob) for token, logprob in step.top)
        return ShownStep(own.text, own.bytes, own.logprob, offset, top)

    def _bytes(self, token: int) -> bytes:
        spelling = self._tokenizer.spelling
        if spelling is not None:
            return spelling.add(token, False)[0]
        text = self._tokenizer.decode([token])
        return b"" if REPLACEMENT in text else text.encode()
