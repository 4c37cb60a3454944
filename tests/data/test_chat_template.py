"""Chat templates give the texts and ids that transformers gives; bad conversations are refused."""

import dataclasses
import pickle
import sys

import pytest
import transformers

from stem_jax.data.chat_template import Chat, load_chat
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.errors import BadRecord, InputError
from tests.chat_templates import TEMPLATES, load, write_chat
from tests.tokenizer_kinds import load_kind, write_dummy_prefix_model

_USER = {"role": "user", "content": " Where is Lima?\nAnd <b>é</b>?  "}
_ANSWER = {"role": "assistant", "content": "In Peru."}
_CONVERSATIONS = [
    [_USER],
    [_USER, _ANSWER],
    [_USER, _ANSWER, {"role": "user", "content": "Sure?"}],
    [{"role": "system", "content": "Be brief."}, _USER, _ANSWER, _USER],
]
_TOOLS = [{"type": "function", "function": {"name": "find", "description": "<é> & \"'"}}]
_CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {"x": "é<"}}}],
}
_REFUSE_SYSTEM = ("mistral", "gemma")


@pytest.fixture(scope="module")
def both_of(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = (load(name, folder), transformers.AutoTokenizer.from_pretrained(folder))
        return made[name]

    return make


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_and_ids_are_those_of_transformers(name, both_of):
    ours, theirs = both_of(name)
    compared = 0
    for messages in _CONVERSATIONS:
        if messages[0]["role"] == "system" and name in _REFUSE_SYSTEM:
            with pytest.raises(BadRecord, match=r"template refuses the messages: .* ?role"):
                ours.text(messages)
            continue
        for more in (False, True):
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=more)
            assert ours.text(messages, add_generation_prompt=more) == text
        if messages[-1]["role"] == "user":
            ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            assert ours.prompt_ids(messages) == ids
            assert ids.count(ours.tokenizer.bos_id) <= 1 or name in ("qwen", "smollm2")
            compared += 1
    assert compared == (2 if name in _REFUSE_SYSTEM else 3)


def test_tools_are_those_of_transformers(both_of):
    ours, theirs = both_of("llama3_tools")
    messages = [_USER, _CALL, {"role": "tool", "content": '{"é": "<1>"}'}]
    text = theirs.apply_chat_template(
        messages, tools=_TOOLS, tokenize=False, add_generation_prompt=True
    )
    assert ours.text(messages, add_generation_prompt=True, tools=_TOOLS) == text
    assert "Today Date: " in text and '"é<"' in text and "    " in text
    ids = theirs.apply_chat_template(messages, tools=_TOOLS, add_generation_prompt=True)
    assert ours.prompt_ids(messages, tools=_TOOLS) == ids["input_ids"]


def test_a_sentencepiece_model_reads_its_special_tokens(tmp_path):
    tokenizer = load_tokenizer("sentencepiece", write_dummy_prefix_model(tmp_path / "t.model"))
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    )
    chat = load_chat(tokenizer, template)
    assert chat.text([_ANSWER]) == "<s>In Peru.</s>"
    assert chat.prompt_ids([_ANSWER]) == [1, *tokenizer.encode_behind("In Peru."), 2]


def test_it_goes_to_another_process(both_of):
    ours, _ = both_of("llama3")
    text = ours.text([_USER])
    again = pickle.loads(pickle.dumps(ours))
    assert isinstance(again, Chat) and again.text([_USER]) == text


@pytest.mark.parametrize(
    "messages, message",
    [
        ("Hi", "messages are of type str: give a list"),
        ([], "there are no messages"),
        (["Hi"], "message 0 is of type str: give an object with role and content"),
        ([_USER, {"content": "x"}], "message 1 has role None: use one of system, "),
        ([{"role": "robot", "content": "x"}], "message 0 has role 'robot': use one of system, "),
        ([{"role": "user"}], "message 0 has content of type NoneType: give a text"),
        ([{"role": "user", "content": [1]}], "message 0 has content of type list: give a text"),
        ([{"role": "assistant"}], "message 0 has content of type NoneType"),
        ([_USER, _USER], "template refuses the messages: Conversation roles must alternate"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, message, both_of):
    with pytest.raises(BadRecord, match=message):
        both_of("mistral")[0].prompt_ids(messages)


def test_a_role_that_the_template_passes_over_is_refused(both_of):
    chat, _ = both_of("zephyr")
    messages = [_USER, _ANSWER, {"role": "tool", "content": "17"}]
    with pytest.raises(BadRecord, match=r"message 2 has role 'tool', which .* leaves out"):
        chat.prompt_ids(messages)


def test_tokenizers_and_templates_without_what_it_takes(tmp_path, monkeypatch):
    plain = load_kind("gpt2", tmp_path / "gpt2")
    with pytest.raises(InputError, match="no chat template: give one with --chat-template=FILE"):
        load_chat(plain)
    several = dataclasses.replace(plain, chat_template={"rag": "x", "tool_use": "y"})
    with pytest.raises(InputError, match=r"\(it has rag, tool_use, no 'default'\)"):
        load_chat(several)
    with pytest.raises(InputError, match=r"cannot be read .*: check the path"):
        load_chat(plain, tmp_path / "none.jinja")
    wrong = tmp_path / "wrong.jinja"
    wrong.write_text("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(InputError, match=r"wrong.jinja is no template .*line 2.*: correct it"):
        load_chat(plain, wrong)
    wrong.write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(BadRecord, match=r"wrong.jinja refuses the messages: .*unsafe"):
        load_chat(plain, wrong).text([_USER])
    with pytest.raises(InputError, match="kind 'bytes' has no texts for special tokens"):
        load_chat(load_tokenizer("bytes"), wrong)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match="needs the jinja2 package: pip install jinja2"):
        load_chat(plain, wrong)


def test_the_default_of_several_templates(tmp_path):
    folder = write_chat("llama3", tmp_path)
    tokenizer = load_tokenizer("hf", folder / "tokenizer.json")
    both = {"tool_use": "other", "default": tokenizer.chat_template}
    chat = load_chat(dataclasses.replace(tokenizer, chat_template=both))
    assert chat.template == tokenizer.chat_template
