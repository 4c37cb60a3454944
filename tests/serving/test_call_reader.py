"""Conversations as their template has them, and models whose template cannot be used."""

import dataclasses
import json

import pytest

from stem_jax.errors import InputError
from stem_jax.serving.api_error import ApiError
from stem_jax.serving.call_reader import CallReader, read_for
from tests.chat_templates import load
from tests.serving.served import BYTES, NAME

USER = {"role": "user", "content": "Where is Lima?"}


def _body(*messages) -> bytes:
    return json.dumps({"model": NAME, "messages": messages}).encode()


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return {name: load(name, tmp_path_factory.mktemp(name)) for name in ("llama3_tools", "gemma")}


def test_a_chat_is_what_the_template_writes(chats):
    chat = chats["llama3_tools"]
    reader = CallReader(NAME, chat.tokenizer, chat, 1000, chat.tokenizer.vocab_size)
    call = reader.chat_completion(_body(USER))
    [prompt] = call.prompts
    assert list(prompt.ids) == chat.prompt_ids([USER])
    parts = {"role": "user", "content": [{"type": "text", "text": "Where is "}]}
    parts["content"].append({"type": "text", "text": "Lima?"})
    assert reader.chat_completion(_body(parts)).prompts == call.prompts
    # As clients send back what they were sent.
    answer = {"role": "assistant", "content": "In Peru.", "refusal": None, "tool_calls": None}
    [prompt] = reader.chat_completion(_body(USER, answer, USER)).prompts
    said = {"role": "assistant", "content": "In Peru."}
    assert list(prompt.ids) == chat.prompt_ids([USER, said, USER])


def test_what_a_template_refuses_is_said(chats):
    chat = chats["gemma"]
    reader = CallReader(NAME, chat.tokenizer, chat, 1000, chat.tokenizer.vocab_size)
    with pytest.raises(ApiError, match="refuses the messages") as refused:
        reader.chat_completion(_body({"role": "system", "content": "Be brief."}, USER))
    assert (refused.value.status, refused.value.param) == (400, "messages")


def test_a_template_that_cannot_be_used(tiny_config, tmp_path):
    config = tiny_config()
    broken = dataclasses.replace(BYTES, chat_template="{% if %}")
    reader = read_for(config, broken, NAME, None)
    with pytest.raises(ApiError, match=r"no chat here: .*special tokens"):
        reader.chat_completion(_body(USER))
    # What somebody asks for has to be there.
    with pytest.raises(InputError, match="cannot be read"):
        read_for(config, broken, NAME, tmp_path / "none")
    assert read_for(config, BYTES, NAME, None).chat is None
