"""What of a conversation is scored, and what conversations and templates are refused."""

import json

import pytest
import transformers

from stem_jax.data.chat_template import load_chat
from stem_jax.data.conversations import conversation_text, encode_conversation, texts_of
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.errors import BadRecord, InputError
from tests.chat_templates import TEMPLATES, load
from tests.tokenizer_kinds import load_kind, write_dummy_prefix_model

# The first begins as the template ends, which some tokenizers make one token of.
ANSWERS = ["\n\nIn Peru, é 日.", "Yes.\n"]
MESSAGES = [
    {"role": "user", "content": "Where is Lima?"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": ANSWERS[1]},
]
_ENDS = {
    "llama3": "<|eot_id|>",
    "llama3_tools": "<|eot_id|>",
    "qwen": "<|im_end|>",
    "smollm2": "<|im_end|>",
    "zephyr": "</s>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
}
# They leave out white space around what is said.
_TRIM = ("llama3", "llama3_tools", "gemma")


def _encoded(chat, messages=MESSAGES, **more):
    return encode_conversation(chat, conversation_text({"messages": messages, **more}))


@pytest.mark.parametrize("name", TEMPLATES)
def test_scored_are_the_answers_and_what_ends_them(name, tmp_path):
    chat = load(name, tmp_path)
    tokenizer = chat.tokenizer
    made = _encoded(chat)
    text_of = {number: text for text, number in tokenizer.special_texts.items()}
    runs, at = [], 0
    while at < len(made.ids):
        end = at
        while end < len(made.ids) and made.scored[end]:
            end += 1
        if end > at:
            runs.append((at, end))
        at = end + 1
    assert len(runs) == 2
    for (start, end), answer, before in zip(
        runs, ANSWERS, (MESSAGES[:1], MESSAGES[:3]), strict=True
    ):
        ids = made.ids[start:end].tolist()
        assert text_of[ids[-1]] == _ENDS[name]
        assert ids[-1] in tokenizer.special.stop_ids
        assert not set(ids[:-1]) & set(text_of)
        said = tokenizer.decode(ids[:-1])
        assert said.strip() == answer.strip()
        assert said == answer or name in _TRIM
        # What stands before an answer is what a prompt has.
        if answer is ANSWERS[0]:
            assert made.ids[:start].tolist() == chat.prompt_ids(before)
    sizes = [len((a.strip() if name in _TRIM else a).encode()) for a in ANSWERS]
    assert made.num_bytes == sum(sizes)
    assert made.ids[-1] == tokenizer.eos_id
    assert made.ids.tolist().count(tokenizer.special.bos_id) <= 1 or name == "smollm2"


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_ids_are_those_of_transformers(name, tmp_path):
    chat = load(name, tmp_path)
    messages = [MESSAGES[0], {"role": "assistant", "content": "In Peru."}, *MESSAGES[2:]]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(messages)["input_ids"]
    found = _encoded(chat, messages).ids.tolist()
    # A document ends with eos, which is not scored where it is not the end of the answer.
    assert found[: len(expected)] == expected
    assert found[len(expected) :] in ([], [chat.tokenizer.eos_id])


def test_eos_behind_the_last_turn_is_not_scored(tmp_path):
    made = _encoded(load("zephyr", tmp_path))
    assert made.ids[-1] == 2 and not made.scored[-1]
    made = _encoded(load("mistral", tmp_path))
    assert made.ids[-1] == 2 and made.scored[-1] and made.ids[-2] != 2


def test_a_token_across_the_beginning_of_an_answer_is_cut(tmp_path):
    tokenizer = load_tokenizer("sentencepiece", write_dummy_prefix_model(tmp_path / "t.model"))
    path = tmp_path / "chat.jinja"
    path.write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    chat = load_chat(tokenizer, path)
    messages = [MESSAGES[0], {"role": "assistant", "content": "the answer"}]
    prompt = chat.prompt_ids(messages[:1])
    whole = tokenizer.encode_special(chat.text(messages))
    assert whole[: len(prompt)] != prompt
    made = _encoded(chat, messages)
    assert made.ids[: len(prompt)].tolist() == prompt
    assert not made.scored[: len(prompt)].any() and made.scored[len(prompt) :].all()
    assert tokenizer.decode(made.ids[len(prompt) :]) == "the answer"


def test_tools_are_for_the_template(tmp_path):
    chat = load("llama3_tools", tmp_path)
    call = {"type": "function", "function": {"name": "find", "arguments": {"x": "y"}}}
    messages = [
        MESSAGES[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "17"},
        MESSAGES[3],
    ]
    made = _encoded(chat, messages, tools=[{"name": "find", "description": "d"}])
    scored = chat.tokenizer.decode(made.ids[made.scored])
    assert scored == '{"name": "find", "arguments": {"x": "y"}}Yes.'
    assert '"description": "d"' in chat.tokenizer.decode(made.ids)
    assert texts_of(conversation_text({"messages": messages})) == [
        MESSAGES[0]["content"],
        "17",
        ANSWERS[1],
    ]


def test_shared_conversations(tmp_path):
    chat = load("qwen", tmp_path)
    turns = [
        ("human", m["content"]) if m["role"] == "user" else ("gpt", m["content"]) for m in MESSAGES
    ]
    turns = [{"from": who, "value": said} for who, said in [("system", "Be brief."), *turns]]
    record = {"id": 1, "conversations": turns}
    found = encode_conversation(chat, conversation_text(record)).ids.tolist()
    messages = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    assert found == _encoded(chat, messages).ids.tolist()


@pytest.mark.parametrize(
    "record, message",
    [
        ([1], "is no object: put one with messages"),
        ({"text": "x"}, r"has no field 'messages' \(it has 'text'\)"),
        ({}, r"has no field 'messages' \(it has nothing\)"),
        ({"messages": "Hi"}, "messages are of type str: give a list"),
        ({"messages": []}, "there are no messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 0 has role 'robot'"),
        ({"messages": MESSAGES[:1]}, "no turn of the assistant: nothing would be scored"),
        (
            {"messages": [MESSAGES[0], {"role": "assistant", "content": " \n"}]},
            "message 1, of the assistant, is empty: take it out",
        ),
        ({"messages": MESSAGES[1:]}, "message 0 is the assistant's: begin with what it answers"),
        (
            {"messages": [{"role": "user", "content": "\ud800"}, MESSAGES[1]]},
            r"lone surrogate '\\ud800': replace it",
        ),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "role 'narrator'"),
        ({"conversations": ["x"]}, "message 0 is of type str"),
    ],
)
def test_what_is_no_conversation_is_a_bad_record(record, message):
    with pytest.raises(BadRecord, match=message):
        conversation_text(record)


def test_the_text_of_a_special_token_in_a_message_is_a_bad_record(tmp_path):
    chat = load("qwen", tmp_path)
    bad = [{"role": "user", "content": "end<|im_end|>"}, MESSAGES[1]]
    with pytest.raises(BadRecord, match=r"message 0 holds '<\|im_end\|>', the text of a special"):
        _encoded(chat, bad)
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}
    bad = [MESSAGES[0], {"role": "assistant", "content": "x", "tool_calls": [call]}]
    with pytest.raises(BadRecord, match=r"message 1 holds '<\|im_end\|>', the text of a special"):
        _encoded(chat, bad)


def test_a_template_that_rewrites_what_was_said_is_refused(tmp_path):
    tokenizer = load("qwen", tmp_path).tokenizer
    path = tmp_path / "rewrites.jinja"
    path.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if loop.last or m.role != "
        "'assistant' %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    chat = load_chat(tokenizer, path)
    assert _encoded(chat, MESSAGES[:2]).scored.any()
    # Of two turns, the first is left out once there is the second.
    with pytest.raises(InputError) as refused:
        _encoded(chat)
    assert not isinstance(refused.value, BadRecord)
    told = str(refused.value)
    assert "rewrites.jinja writes the beginning of a conversation in another way once" in told
    place = len("<|im_start|>user\nWhere is Lima?<|im_end|>\n<|im_start|>assistant\n")
    assert f"message 3 is there: at character {place} '\\n\\nIn Peru, é 日." in told
    assert "becomes '<|im_end|>\\n" in told


def test_an_answer_must_end_with_a_token_that_ends_completions(tmp_path):
    tokenizer = load_kind("gpt2", tmp_path)
    path = tmp_path / "plain.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role + '|' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant|' }}{% endif %}"
    )
    with pytest.raises(
        InputError,
        match=r"ends a turn .* with '.*\\n', in which no token ends a "
        r"completion \('<\|endoftext\|>' do\): name the one that shall by --stop",
    ):
        _encoded(load_chat(tokenizer, path))
    # That of another's turn is not the assistant's.
    path.write_text(
        "{% for m in messages %}{{ m.role + '|' + m.content }}{% if m.role == 'user' %}"
        "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ 'assistant|' }}{% endif %}"
    )
    with pytest.raises(InputError, match="in which no token ends a completion"):
        _encoded(load_chat(tokenizer, path))


def test_what_is_stored_is_json(tmp_path):
    text = conversation_text({"messages": MESSAGES, "score": float("nan")})
    assert json.loads(text) == {"messages": MESSAGES, "tools": None}
