"""Reads the bodies of requests for a model: what it takes, and what it refuses by name."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stem_jax.config import Config
from stem_jax.data.chat_template import Chat, load_chat
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.errors import InputError
from stem_jax.generation.sampling import Sampling
from stem_jax.json_fields import MOST
from stem_jax.serving.api_error import ApiError
from stem_jax.serving.body import Body
from stem_jax.serving.call import Call, Prompt
from stem_jax.serving.messages import read_messages
from stem_jax.serving.request import MAX_LOGPROBS

# Of one request, over all its prompts.
MOST_CHOICES = 128
_MOST_STOPS = 4
# Of a stop string: each new piece of text is compared with its beginnings.
_LONGEST_STOP = 256
_COMPLETION_TOKENS = 16
# Of a token, on average: longer ones are rare, and runs of spaces.
_MOST_CHARACTERS = 128
_NO_CHAT = (
    "this model has no chat template; use /v1/completions, or start the server with "
    "--chat-template=FILE"
)
_SEEDS = -(2**63), 2**63 - 1
# Fields of OpenAI's API that change nothing at these values, and are refused at others.
_NEUTRAL: dict[str, tuple] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
}
_NEUTRAL_COMPLETION = _NEUTRAL | {"best_of": (1,), "suffix": ("",)}
_NEUTRAL_CHAT = _NEUTRAL | {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "web_search_options": (),
}


@dataclasses.dataclass(frozen=True)
class CallReader:
    """Reads bodies for a model.

    name: that requests have to ask for. chat: None without one, and no_chat says why. context:
    tokens of prompt and completion. vocab_size: ids lie below.
    """

    name: str
    tokenizer: Tokenizer
    chat: Chat | None
    context: int
    vocab_size: int
    no_chat: str = _NO_CHAT

    def completion(self, source: bytes) -> Call:
        """The body of /v1/completions. Raises ApiError that names the field."""
        body = Body(source)
        self._model(body)
        body.refuse(_NEUTRAL_COMPLETION)
        logprobs = body.integer("logprobs", None, 0, MAX_LOGPROBS)
        echo = body.boolean("echo")
        if echo and logprobs is not None:
            raise ApiError("echo with logprobs is not supported; ask for one of them", param="echo")
        tokens = body.integer("max_tokens", _COMPLETION_TOKENS, 1, MOST)
        prompts = tuple(self._prompts(body.value("prompt")))
        return self._call(body, prompts, tokens, logprobs, echo)

    def chat_completion(self, source: bytes) -> Call:
        """The body of /v1/chat/completions. Raises ApiError that names the field."""
        body = Body(source)
        self._model(body)
        body.refuse(_NEUTRAL_CHAT)
        if self.chat is None:
            raise ApiError(self.no_chat, param="messages")
        wanted = body.boolean("logprobs")
        top = body.integer("top_logprobs", 0, 0, MAX_LOGPROBS)
        if top and not wanted:
            raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
        tokens = body.integer("max_completion_tokens", None, 1, MOST)
        older = body.integer("max_tokens", None, 1, MOST)
        if tokens is not None and older is not None:
            raise ApiError("give max_completion_tokens alone", param="max_tokens")
        messages = read_messages(body.value("messages"))
        self._check_length(sum(len(message["content"]) for message in messages), "messages")
        try:
            ids = self.chat.prompt_ids(messages)
        except InputError as error:
            raise ApiError(str(error), param="messages") from error
        prompt = self._checked(ids, "", "messages")
        tokens = older if tokens is None else tokens
        return self._call(body, (prompt,), tokens, top if wanted else None, False)

    def _model(self, body: Body) -> None:
        name = body.text("model")
        if name is None:
            raise ApiError(f"model is missing; this server has {self.name}", param="model")
        self.check_model(name)

    def check_model(self, name: str) -> None:
        """Raises ApiError if the model has another name."""
        if name != self.name:
            raise ApiError(
                f"the model {name[:80]!r} does not exist; this server has {self.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    def _call(
        self,
        body: Body,
        prompts: tuple[Prompt, ...],
        tokens: int | None,
        logprobs: int | None,
        echo: bool,
    ) -> Call:
        """With the fields that both ways have."""
        stream = body.boolean("stream")
        usage = _usage(body.value("stream_options"), stream)
        choices = body.integer("n", 1, 1, MOST_CHOICES)
        if choices * len(prompts) > MOST_CHOICES:
            raise ApiError(
                f"n={choices} of {len(prompts)} prompts is more than {MOST_CHOICES} completions; "
                "send several requests",
                param="n",
            )
        sampling = _sampling(body)
        seed = body.integer("seed", None, *_SEEDS)
        stops = _stops(body.value("stop"))
        body.ignore("user", "metadata", "store", "service_tier", "safety_identifier")
        body.ignore("prompt_cache_key", "verbosity")
        body.nothing_else()
        return Call(prompts, choices, tokens, sampling, seed, stops, logprobs, echo, stream, usage)

    def _prompts(self, given: Any) -> Sequence[Prompt]:
        """A text, ids, or a list of texts or of ids."""
        if isinstance(given, str) or _are_ids(given):
            given = [given]
        if not isinstance(given, list) or not given:
            raise ApiError(
                "prompt must be a text, a list of token ids, or a list of either", param="prompt"
            )
        if len(given) > MOST_CHOICES:
            raise ApiError(
                f"prompt has {len(given)} prompts, more than {MOST_CHOICES}; send several requests",
                param="prompt",
            )
        return [self._prompt(one) for one in given]

    def _prompt(self, given: Any) -> Prompt:
        if isinstance(given, str):
            self._check_length(len(given), "prompt")
            try:
                return self._checked(self.tokenizer.encode_prompt(given), given, "prompt")
            except InputError as error:
                raise ApiError(str(error), param="prompt") from error
        if not _are_ids(given):
            raise ApiError(
                "prompt must be a text, a list of token ids, or a list of either", param="prompt"
            )
        checked = self._checked(given, "", "prompt")
        return dataclasses.replace(checked, text=self.tokenizer.decode(given))

    def _check_length(self, characters: int, field: str) -> None:
        """Refuses, before it is tokenized, what is longer than any text of the context."""
        if characters > self.context * _MOST_CHARACTERS:
            raise ApiError(
                f"{field} has {characters} characters, more than {_MOST_CHARACTERS} for each token "
                f"of the context of {self.context}; shorten it",
                param=field,
                code="context_length_exceeded",
            )

    def _checked(self, ids: Sequence[int], text: str, field: str) -> Prompt:
        if not 0 < len(ids) < self.context:
            raise ApiError(
                f"{field} has {len(ids)} tokens (bos included), the context of {self.context} "
                f"takes 1 to {self.context - 1} and new ones; shorten it",
                param=field,
                code="context_length_exceeded" if ids else None,
            )
        if not (min(ids) >= 0 and max(ids) < self.vocab_size):
            raise ApiError(
                f"{field} has ids from {min(ids)} to {max(ids)}, the model knows 0 to "
                f"{self.vocab_size - 1}; use the tokenizer that it was trained with",
                param=field,
            )
        return Prompt(tuple(ids), text)


def _are_ids(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(item) is int for item in given)


def _sampling(body: Body) -> Sampling:
    values = {
        "temperature": body.number("temperature", 1.0),
        "top_k": body.integer("top_k", 0, 0, MOST),
        "top_p": body.number("top_p", 1.0),
    }
    try:
        return Sampling(**values)
    except InputError as error:
        # It begins with the name.
        raise ApiError(str(error), param=str(error).partition("=")[0]) from error


def _stops(given: Any) -> tuple[str, ...]:
    if given is None:
        return ()
    stops = [given] if isinstance(given, str) else given
    texts = isinstance(stops, list) and all(isinstance(stop, str) for stop in stops)
    if not (
        texts and len(stops) <= _MOST_STOPS and all(0 < len(s) <= _LONGEST_STOP for s in stops)
    ):
        raise ApiError(
            f"stop must be a text or a list of up to {_MOST_STOPS}, each of 1 to {_LONGEST_STOP} "
            "characters",
            param="stop",
        )
    return tuple(stops)


def _usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise ApiError("stream_options needs stream: true", param="stream_options")
    known = {"include_usage", "include_obfuscation"}
    if not isinstance(options, dict) or not set(options) <= known:
        raise ApiError("stream_options takes include_usage alone", param="stream_options")
    wanted = options.get("include_usage", False)
    if not isinstance(wanted, bool):
        raise ApiError("include_usage must be true or false", param="stream_options.include_usage")
    return wanted


def read_for(config: Config, tokenizer: Tokenizer, name: str, template: Path | None) -> CallReader:
    """Reads for a run. template: in place of the tokenizer's own, which may have none.

    Raises InputError for a template that cannot be used; without one that the tokenizer came with,
    completions are served all the same.
    """
    sizes = config.train.seq_len, config.model.vocab_size
    if template is None and tokenizer.chat_template is None:
        return CallReader(name, tokenizer, None, *sizes)
    try:
        return CallReader(name, tokenizer, load_chat(tokenizer, template), *sizes)
    except InputError as error:
        if template is not None:
            raise
        return CallReader(name, tokenizer, None, *sizes, no_chat=f"no chat here: {error}")
