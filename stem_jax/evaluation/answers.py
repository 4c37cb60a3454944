"""Whether a model completes prompts with given answers, also with other rows than its own."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from stem_jax.data.tokenizer import Tokenizer
from stem_jax.errors import InputError
from stem_jax.evaluation.scoring import Scorer

_OWN: Mapping[int, int] = {}


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt, and an answer that follows it after a space.

    end: text right after the answer that belongs to it, such as the full stop by which "New" is
    told from "New Delhi". keys: the row that is read for a token id, if not its own, as the run's
    row source knows it; it holds for the answer's tokens, too. embedded: the token id whose
    embedding is read for another one of the prompt.
    """

    prompt: str
    answer: str
    end: str = ""
    keys: Mapping[int, int] = dataclasses.field(default_factory=lambda: _OWN)
    embedded: Mapping[int, int] = dataclasses.field(default_factory=lambda: _OWN)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """exact: greedy decoding gives the answer and its end. log_likelihood: nats per token of it.
    reads: the prompt has a token whose row or embedding is not its own."""

    exact: bool
    log_likelihood: float
    reads: bool = False


def answer_all(
    scorer: Scorer,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    on_scored: Callable[[int], object] | None = None,
) -> list[Verdict]:
    """Asks questions, each by itself.

    Greedy decoding gives an answer exactly if each of its tokens is the likeliest after the right
    ones before it, so one forward pass decides.

    Args:
        on_scored: called with a number of questions whenever that many more are done.

    Raises:
        InputError: an answer without text, or a question that is longer than the context.
    """
    sequences, keys, lengths, reads = [], [], [], []
    for question in questions:
        if not question.answer.strip():
            raise InputError(f"the answer to {question.prompt!r} is empty; give one")
        prompt = [*tokenizer.special.begin_ids, *tokenizer.encode(question.prompt)]
        answer = tokenizer.encode_behind(f" {question.answer}{question.end}")
        ids = prompt + answer
        if len(ids) > scorer.context + 1:
            raise InputError(
                f"the prompt {question.prompt[:60]!r} has with its answer {len(ids)} tokens, the "
                f"context of train.seq_len={scorer.context} takes {scorer.context + 1}; shorten it"
            )
        lengths.append(len(answer))
        reads.append(not {*question.keys, *question.embedded}.isdisjoint(prompt))
        keys.append([question.keys.get(token, token) for token in ids])
        # The answer that is asked for stays what it is.
        sequences.append([*(question.embedded.get(token, token) for token in prompt), *answer])
    scores = scorer.score(sequences, on_scored, keys)
    return [
        Verdict(bool(score.greedy[-n:].all()), float(score.log_likelihoods[-n:].mean()), read)
        for score, n, read in zip(scores, lengths, reads, strict=True)
    ]
