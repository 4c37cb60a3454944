"""What the engine is asked for, and what it answers step by step."""

import dataclasses
import math
from typing import Literal

from stem_jax.errors import InputError
from stem_jax.generation.sampling import Sampling

# Likeliest tokens whose log-probabilities can be had; programs find so many at a time.
MAX_LOGPROBS = 5
# In place of a token, where a request ends without one.
NO_NEW_TOKEN = -1

Finish = Literal["stop", "length", "cancelled", "error"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to complete.

    prompt_ids: what every prompt begins with included. max_new_tokens: at most; the context may end
    it sooner. seed: below 2^32; one of `generator.sequence_seeds` gives what `generate` draws.
    top_logprobs: how many of the likeliest tokens each step names, up to MAX_LOGPROBS; None: not
    even its own token's log-probability, which costs a little. stop_ids: that end it beside those
    of the tokenizer.

    Raises:
        InputError: a value outside its range.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int = 64
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    top_logprobs: int | None = None
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed={self.seed} must be from 0 to {2**32 - 1}")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise InputError(
                f"top_logprobs={self.top_logprobs} must be from 0 to {MAX_LOGPROBS}; ask for fewer"
            )


@dataclasses.dataclass(frozen=True)
class Step:
    """A new token of a request, or its end without one.

    token: a stop id where finish is "stop"; NO_NEW_TOKEN where it is "cancelled" or "error".
    logprob: natural logarithm of the token's probability by the model, before temperature, among
    all ids that stand for something; NaN without a token, or where nobody asked. top: (id, logprob)
    of the likeliest tokens, as many as asked for, likeliest first. finish: None as long as more
    follows.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    finish: Finish | None = None

    @classmethod
    def ended(cls, finish: Finish) -> "Step":
        """The end of a request without a further token."""
        return cls(NO_NEW_TOKEN, math.nan, (), finish)


class QueueFull(Exception):
    """No room among the waiting requests. retry_after: seconds after which there should be."""

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} requests wait already; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class NotServing(Exception):
    """The engine takes no requests: it was not started, is being drained, closed, or has failed."""
