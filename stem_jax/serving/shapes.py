"""Answers in the shapes of OpenAI's two APIs: whole, or in the chunks of a stream."""

import dataclasses
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from stem_jax.serving.call import Call
from stem_jax.serving.choice import TextPiece
from stem_jax.serving.token_text import ShownStep, ShownToken


@dataclasses.dataclass
class WholeChoice:
    """All pieces of a choice, joined."""

    text: str = ""
    steps: list[ShownStep] = dataclasses.field(default_factory=list)
    finish: str | None = None

    def add(self, piece: TextPiece) -> None:
        """Takes the next one."""
        self.text += piece.text
        self.steps += piece.steps
        self.finish = piece.finish


class Shape(Protocol):
    """One of the two APIs, for one call."""

    def whole(self, choices: Sequence[WholeChoice]) -> dict[str, Any]:
        """The answer, but for its usage."""

    def openings(self) -> list[dict[str, Any]]:
        """The chunks that a stream begins with."""

    def chunk(self, piece: TextPiece) -> dict[str, Any] | None:
        """The chunk of a piece; None if there is nothing to say."""

    def closing(self) -> dict[str, Any]:
        """A chunk without choices, for the usage."""


class CompletionShape:
    """/v1/completions."""

    def __init__(self, call: Call, name: str, created: int):
        self._call = call
        self._facts = _facts("cmpl", "text_completion", name, created)
        self._echoes = [
            p.text if call.echo else "" for p in call.prompts for _ in range(call.choices)
        ]

    def whole(self, choices: Sequence[WholeChoice]) -> dict[str, Any]:
        found = [
            self._choice(index, self._echoes[index] + one.text, one.steps, one.finish)
            for index, one in enumerate(choices)
        ]
        return {**self._facts, "choices": found}

    def openings(self) -> list[dict[str, Any]]:
        echoes = [(index, text) for index, text in enumerate(self._echoes) if text]
        return [
            {**self._facts, "choices": [self._choice(index, text, (), None)]}
            for index, text in echoes
        ]

    def chunk(self, piece: TextPiece) -> dict[str, Any] | None:
        if not (piece.text or piece.steps or piece.finish):
            return None
        choice = self._choice(piece.choice, piece.text, piece.steps, piece.finish)
        return {**self._facts, "choices": [choice]}

    def closing(self) -> dict[str, Any]:
        return {**self._facts, "choices": []}

    def _choice(
        self, index: int, text: str, steps: Sequence[ShownStep], finish: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self._call.logprobs is not None:
            logprobs = {
                "tokens": [step.text for step in steps],
                "token_logprobs": [step.logprob for step in steps],
                "top_logprobs": [{t.text: t.logprob for t in step.top} for step in steps],
                "text_offset": [step.offset for step in steps],
            }
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


class ChatShape:
    """/v1/chat/completions."""

    def __init__(self, call: Call, name: str, created: int):
        self._call = call
        self._facts = _facts("chatcmpl", "chat.completion", name, created)
        self._chunk_facts = {**self._facts, "object": "chat.completion.chunk"}

    def whole(self, choices: Sequence[WholeChoice]) -> dict[str, Any]:
        found = [
            {
                "index": index,
                "message": {"role": "assistant", "content": one.text, "refusal": None},
                "logprobs": self._logprobs(one.steps),
                "finish_reason": one.finish,
            }
            for index, one in enumerate(choices)
        ]
        return {**self._facts, "choices": found}

    def openings(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [self._delta(index, delta, (), None) for index in range(self._call.choices)]

    def chunk(self, piece: TextPiece) -> dict[str, Any] | None:
        if not (piece.text or piece.steps or piece.finish):
            return None
        delta = {"content": piece.text} if piece.text or piece.steps else {}
        return self._delta(piece.choice, delta, piece.steps, piece.finish)

    def closing(self) -> dict[str, Any]:
        return {**self._chunk_facts, "choices": []}

    def _delta(
        self, index: int, delta: dict[str, Any], steps: Sequence[ShownStep], finish: str | None
    ) -> dict[str, Any]:
        logprobs = self._logprobs(steps) if steps else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._chunk_facts, "choices": [choice]}

    def _logprobs(self, steps: Sequence[ShownStep]) -> dict[str, Any] | None:
        if self._call.logprobs is None:
            return None
        content = [
            {**_shown(step), "top_logprobs": [_shown(token) for token in step.top]}
            for step in steps
        ]
        return {"content": content, "refusal": None}


def usage(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """The counts of an answer. Tokens that end completions count as new ones."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }


def _facts(prefix: str, kind: str, name: str, created: int) -> dict[str, Any]:
    number = f"{prefix}-{uuid.uuid4().hex}"
    return {"id": number, "object": kind, "created": created, "model": name}


def _shown(token: ShownToken) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.bytes)}
