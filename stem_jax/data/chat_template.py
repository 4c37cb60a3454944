"""Conversations as text and ids: a tokenizer's chat template, rendered as transformers does it."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from stem_jax.data.packing import one_line, optional
from stem_jax.data.shipped_files import DEFAULT_TEMPLATE
from stem_jax.data.tokenizer_kinds import Tokenizer
from stem_jax.errors import BadRecord, InputError

Messages = Sequence[dict[str, Any]]
# Of functions that may be called, as JSON schemas.
Tools = Sequence[dict[str, Any]]
# Who speaks in a conversation; templates know some of them.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# Some templates put the words of a system elsewhere than in their turn.
_ALWAYS_KNOWN = ("system", "developer", "user", "assistant")
# By which a template asks for the date.
_NOW = "strftime_now"
# Before it a template could reach out of the sandbox.
_OLDEST_JINJA = (3, 1, 6)


@dataclasses.dataclass(frozen=True)
class Chat:
    """A tokenizer and the template that turns conversations into its text.

    Messages are objects with a `role` of ROLES and a `content`, a text; an assistant's that calls
    tools may have none. What else they have is for the template.

    template: Jinja source. name: of the template in messages. moment: what is now to a template
        that writes dates; None: when it is rendered.
    """

    tokenizer: Tokenizer
    template: str = dataclasses.field(repr=False)
    name: str
    moment: datetime | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The compiled template does not travel to other processes.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def text(
        self,
        messages: Messages,
        add_generation_prompt: bool = False,
        tools: Tools | None = None,
    ) -> str:
        """The conversation as text, as transformers' `apply_chat_template` writes it.

        add_generation_prompt: end with what an assistant's turn begins with. tools: that may be
            called, as JSON schemas.
        Raises BadRecord, an InputError, for messages that are none, and where the template refuses.
        """
        check_messages(messages)
        return self._render(messages, add_generation_prompt, tools)

    def prompt_ids(self, messages: Messages, tools: Tools | None = None) -> list[int]:
        """Ids [n] of `prompt`: texts of special tokens are these tokens, also in a user's words."""
        return self.tokenizer.encode_special(self.prompt(messages, tools))

    def prompt(self, messages: Messages, tools: Tools | None = None) -> str:
        """The conversation up to where the assistant's next turn begins.

        Raises as `text` does, and for a message that the template leaves out.
        """
        text = self.text(messages, add_generation_prompt=True, tools=tools)
        self.check_roles(messages, tools)
        return text

    @property
    def prompt_tokenizer(self) -> Tokenizer:
        """The tokenizer, with prompts that have nothing before what the template writes.

        Its `encode_prompt(prompt(messages), special=True)` gives `prompt_ids`.
        """
        special = dataclasses.replace(self.tokenizer.special, prompt_ids=())
        return dataclasses.replace(self.tokenizer, special=special)

    def check_roles(self, messages: Messages, tools: Tools | None = None) -> None:
        """Raises BadRecord for a message of a role that the template passes over in silence."""
        for index, message in enumerate(messages):
            if message["role"] in _ALWAYS_KNOWN:
                continue
            before, after = (
                self._render(messages[:end], False, tools) for end in (index, index + 1)
            )
            if before == after:
                raise BadRecord(
                    f"message {index} has role {message['role']!r}, which {self.name} leaves out: "
                    "take it out, or give another template"
                )

    def _render(
        self,
        messages: Messages,
        add_generation_prompt: bool,
        tools: Tools | None,
    ) -> str:
        try:
            return self._compiled.render(
                messages=[_without_null(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._token_texts,
            )
        # A template is a program: what it does with messages that it did not expect is its own.
        except Exception as error:
            raise BadRecord(f"{self.name} refuses the messages: {one_line(error)}") from error

    @functools.cached_property
    def _compiled(self) -> Any:
        return compile_template(self.template, self.name, self.moment)

    @property
    def is_dated(self) -> bool:
        """Whether what it writes depends on the moment."""
        return _NOW in self.template

    @functools.cached_property
    def _token_texts(self) -> dict[str, str]:
        special, texts = self.tokenizer.special, self.tokenizer.special_texts
        text_of = {number: text for text, number in texts.items()}
        ids = {
            "bos_token": special.bos_id,
            "eos_token": special.eos_id,
            "pad_token": special.pad_id,
        }
        return {name: text_of[n] for name, n in ids.items() if n is not None and n in text_of}


def load_chat(tokenizer: Tokenizer, path: Path | None = None) -> Chat:
    """The chat of a tokenizer, by the template that it came with or that of a file.

    Raises InputError if there is none, it is no template, the tokenizer has no texts for special
    tokens, or the jinja2 package is missing.
    """
    found = tokenizer.chat_template
    name = "the tokenizer's chat template"
    template = found if isinstance(found, str) else (found or {}).get(DEFAULT_TEMPLATE)
    if path is not None:
        name = f"chat template {path}"
        try:
            template = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{name} cannot be read ({one_line(error)}): check the path"
            ) from error
    if template is None:
        others = f" (it has {', '.join(found)}, no {DEFAULT_TEMPLATE!r})" if found else ""
        raise InputError(
            f"the tokenizer came with no chat template{others}: give one with --chat-template=FILE"
        )
    if not tokenizer.special_texts:
        raise InputError(
            f"a tokenizer of kind {tokenizer.kind!r} has no texts for special tokens, which a chat "
            "template writes: use another tokenizer"
        )
    chat = Chat(tokenizer, template, name)
    # A mistake in the template is said before any message is read.
    chat._compiled  # noqa: B018
    return chat


def check_messages(messages: Any) -> None:
    """Raises BadRecord for what is no conversation, and says what is wrong with it."""
    if not isinstance(messages, list | tuple):
        raise BadRecord(f"messages are of type {type(messages).__name__}: give a list of them")
    if not messages:
        raise BadRecord("there are no messages: give one at least")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadRecord(
                f"message {index} is of type {type(message).__name__}: give an object with role and"
                " content"
            )
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise BadRecord(f"message {index} has role {role!r}: use one of {', '.join(ROLES)}")
        if content is None and role == "assistant" and message.get("tool_calls"):
            continue
        if not isinstance(content, str):
            raise BadRecord(
                f"message {index} has content of type {type(content).__name__}: give a text"
            )


def compile_template(template: str, name: str, moment: datetime | None = None) -> Any:
    """A template as jinja2 renders it, in a sandbox. moment: see `Chat`.

    Raises InputError for a mistake in it, with its line.
    """
    jinja2 = optional("jinja2", name)
    for part in ("jinja2.sandbox", "jinja2.ext"):
        optional(part, name)
    extension: Any = jinja2.ext.Extension
    version = tuple(int(part) for part in jinja2.__version__.split(".")[:3])
    if version < _OLDEST_JINJA:
        oldest = ".".join(map(str, _OLDEST_JINJA))
        raise InputError(
            f"{name} needs jinja2 {oldest} or later, this is {jinja2.__version__}: "
            f"pip install 'jinja2>={oldest}'"
        )

    class Generation(extension):
        """Marks of what an assistant said, which some templates have: they write nothing."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def as_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    environment.globals[_NOW] = lambda form: (moment or datetime.now()).strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(
            f"{name} is no template ({one_line(error)}, line {error.lineno}): correct it"
        ) from error


def _without_null(message: dict[str, Any]) -> dict[str, Any]:
    """A message without fields that are null, which few templates expect."""
    return {key: value for key, value in message.items() if value is not None}
