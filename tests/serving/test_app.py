"""What OpenAI's API asks for, and how what is wrong is said; the engine is a fake."""

import contextlib
import dataclasses
import json

import pytest

from stem_jax.generation.generator import sequence_seeds
from stem_jax.serving.request import Request
from tests.serving.fake_engine import FakeEngine
from tests.serving.served import (
    BYTES,
    CHAT,
    COMPLETIONS,
    CONTEXT,
    NAME,
    ask,
    ask_all,
    events,
    service_of,
)

ASKED = {"model": NAME, "prompt": "abc", "max_tokens": 8}


class EchoChat:
    """A chat that writes what was said."""

    def prompt_ids(self, messages):
        return BYTES.encode_prompt("".join(f"{m['role']}:{m['content']}\n" for m in messages))


@pytest.fixture
def service():
    with contextlib.closing(FakeEngine()) as engine:
        yield service_of(engine, EchoChat())


def said(answer) -> tuple[int, str | None, str]:
    """Status, field and message of an error."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["param"], error["message"]


def test_a_completion(service):
    answer = ask(service, COMPLETIONS, ASKED).json()
    assert answer["object"] == "text_completion" and answer["model"] == NAME
    assert answer["id"].startswith("cmpl-") and answer["created"] > 1_700_000_000
    [choice] = answer["choices"]
    assert choice == {
        "index": 0,
        "text": "abcdefab",
        "logprobs": None,
        "finish_reason": "length",
    }
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 8, "total_tokens": 12}


def test_a_chat(service):
    body = {"model": NAME, "messages": [{"role": "user", "content": "hi"}]}
    answer = ask(service, CHAT, body).json()
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    [choice] = answer["choices"]
    prompt = len("user:hi\n") + 1
    # Up to the end of the context.
    assert choice["message"]["content"] == ("abcdef" * 20)[: CONTEXT - prompt]
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == CONTEXT
    [ticket] = service.engine.tickets
    assert list(ticket.request.prompt_ids) == BYTES.encode_prompt("user:hi\n")
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    body = {"model": NAME, "messages": [{"role": "user", "content": parts}], "max_tokens": 3}
    assert ask(service, CHAT, body).json()["choices"][0]["message"]["content"] == "abc"
    assert service.engine.tickets[-1].request.prompt_ids == ticket.request.prompt_ids


def test_streams(service):
    body = {**ASKED, "stream": True, "n": 2, "stream_options": {"include_usage": True}}
    answer = ask(service, COMPLETIONS, body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(answer)
    for index in range(2):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in own) == "abcdefab"
        assert [choice["finish_reason"] for choice in own] == [None] * 7 + ["length"]
    assert {chunk["id"] for chunk in chunks} == {last["id"]}
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 4, "completion_tokens": 16, "total_tokens": 20}

    body = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    first, *rest = events(ask(service, CHAT, {**body, "max_completion_tokens": 3}))
    assert first["object"] == "chat.completion.chunk" and "usage" not in first
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [c["choices"][0]["delta"] for c in rest] == [{"content": t} for t in "abc"]
    assert [c["choices"][0]["finish_reason"] for c in rest] == [None, None, "length"]


def test_prompts_of_every_form(service):
    ids = BYTES.encode_prompt("xy")
    for prompt, expected in [
        ("xy", [ids]),
        (ids, [ids]),
        (["xy", "z"], [ids, BYTES.encode_prompt("z")]),
        ([ids, [5]], [ids, [5]]),
    ]:
        service.engine.tickets.clear()
        body = {**ASKED, "prompt": prompt, "echo": True, "max_tokens": 1, "n": 2}
        choices = ask(service, COMPLETIONS, body).json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(2 * len(expected)))
        found = [list(ticket.request.prompt_ids) for ticket in service.engine.tickets]
        assert found == [each for each in expected for _ in range(2)]
        texts = [BYTES.decode(each) + "a" for each in expected for _ in range(2)]
        assert [choice["text"] for choice in choices] == texts


def test_settings_reach_the_engine(service):
    body = {**ASKED, "temperature": 0.5, "top_p": 0.25, "top_k": 3, "seed": -7, "n": 2, "user": "u"}
    ask(service, COMPLETIONS, body)
    requests = [ticket.request for ticket in service.engine.tickets]
    prompt = tuple(BYTES.encode_prompt("abc"))
    seeds = sequence_seeds(-7, [prompt, prompt])
    how = requests[0].sampling
    assert (how.temperature, how.top_p, how.top_k) == (0.5, 0.25, 3)
    assert requests == [Request(prompt, 8, how, seed) for seed in seeds]
    service.engine.tickets.clear()
    ask_all(service, [(COMPLETIONS, {"model": NAME, "prompt": "abc"})] * 2)
    first, second = (ticket.request for ticket in service.engine.tickets)
    how = first.sampling
    assert (how.temperature, how.top_p, how.top_k, first.max_new_tokens) == (1.0, 1.0, 0, 16)
    # Without a seed, any.
    assert first.seed != second.seed


def test_stop_strings_end_a_choice_and_free_its_slot(service):
    body = {**ASKED, "max_tokens": 50, "stop": ["ea", "de", "zz"]}
    answer = ask(service, COMPLETIONS, body).json()
    assert answer["choices"][0]["text"] == "abc"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 5
    [ticket] = service.engine.tickets
    assert ticket.ended.wait(30) and ticket.made < 50
    chunks = events(ask(service, COMPLETIONS, {**body, "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abc"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_choice_that_a_stop_string_ends_makes_room_for_the_next():
    with contextlib.closing(FakeEngine(slots=1, pause=0.01)) as engine:
        body = {**ASKED, "max_tokens": 50, "stop": "c", "n": 2}
        choices = ask(service_of(engine), COMPLETIONS, body).json()["choices"]
    assert [choice["text"] for choice in choices] == ["ab", "ab"]
    # The second begins when the first has ended.
    assert all(ticket.made < 50 for ticket in engine.tickets)


def test_logprobs(service):
    body = {**ASKED, "max_tokens": 7, "logprobs": 2, "stop": "ef"}
    whole = ask(service, COMPLETIONS, body).json()["choices"][0]
    assert whole["text"] == "abcd"
    assert whole["logprobs"] == {
        "tokens": list("abcd"),
        "token_logprobs": [-0.5] * 4,
        "top_logprobs": [{"a": -1.0, "b": -2.0}] * 4,
        "text_offset": [0, 1, 2, 3],
    }
    chunks = events(ask(service, COMPLETIONS, {**body, "stream": True}))
    streamed = [chunk["choices"][0]["logprobs"]["tokens"] for chunk in chunks]
    assert "".join(map("".join, streamed)) == "abcd"

    body = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    body |= {"logprobs": True, "top_logprobs": 1}
    [entry] = ask(service, CHAT, body).json()["choices"][0]["logprobs"]["content"]
    top = {"token": "a", "logprob": -1.0, "bytes": [97]}
    assert entry == {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [top]}


@pytest.mark.parametrize(
    ("changed", "field", "message"),
    [
        ({"prompt": [3, 258]}, "prompt", "ids from 3 to 258, the model knows 0 to 257"),
        ({"prompt": [-1]}, "prompt", "ids from -1 to -1"),
        ({"prompt": "p" * CONTEXT}, "prompt", f"has {CONTEXT + 1} tokens"),
        ({"prompt": None}, "prompt", "must be a text"),
        ({"prompt": []}, "prompt", "must be a text"),
        ({"prompt": [1.5]}, "prompt", "must be a text"),
        ({"prompt": [True]}, "prompt", "must be a text"),
        ({"prompt": ["a"] * 129}, "prompt", "129 prompts"),
        ({"prompt": "\ud800"}, "prompt", "lone surrogate"),
        ({"n": 0}, "n", "n is 0"),
        ({"n": 129}, "n", "from 1 to 128"),
        ({"n": 65, "prompt": ["a", "b"]}, "n", "more than 128"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0"),
        ({"max_tokens": 2.0}, "max_tokens", "a whole number"),
        ({"temperature": -1}, "temperature", "temperature=-1"),
        ({"temperature": "hot"}, "temperature", "a number"),
        ({"top_p": 0}, "top_p", "top_p=0"),
        ({"top_k": -1}, "top_k", "top_k is -1"),
        ({"seed": 2**63}, "seed", "seed is"),
        ({"stop": ["a"] * 5}, "stop", "up to 4"),
        ({"stop": ""}, "stop", "1 to 256"),
        ({"stop": 3}, "stop", "a text or a list"),
        ({"logprobs": 6}, "logprobs", "from 0 to 5"),
        ({"logprobs": 1, "echo": True}, "echo", "not supported"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "include_usage alone"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"prompt_embeds": "x"}, "prompt_embeds", "no field"),
        ({"\ud800": 1}, "\ud800", "no field"),
        ({"model": None}, "model", "model is missing"),
    ],
)
def test_refused_completions_name_the_field(service, changed, field, message):
    body = json.dumps({**ASKED, **changed}).encode()
    status, param, text = said(ask(service, COMPLETIONS, body))
    assert (status, param) == (400, field) and message in text
    assert service.engine.tickets == []


@pytest.mark.parametrize(
    ("changed", "field", "message"),
    [
        ({"messages": []}, "messages", "one or more"),
        ({"messages": "hi"}, "messages", "must be a list"),
        ({"messages": ["hi"]}, "messages[0]", "an object"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "'wizard'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'tool'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "must be a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
            "of type text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]},
            "messages[0].tool_calls",
            "not supported",
        ),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 6}, "top_logprobs", "from 0 to 5"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens", "alone"),
        ({"prompt": "x"}, "prompt", "no field"),
    ],
)
def test_refused_chats_name_the_field(service, changed, field, message):
    body = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], **changed}
    status, param, text = said(ask(service, CHAT, body))
    assert (status, param) == (400, field) and message in text


def test_values_that_change_nothing_are_taken(service):
    nothing = {"logit_bias": {}, "frequency_penalty": 0, "presence_penalty": 0.0, "best_of": 1}
    nothing |= {"suffix": None, "stop": None, "seed": None, "n": None, "stream": False}
    assert ask(service, COMPLETIONS, {**ASKED, **nothing}).status_code == 200
    body = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "tools": []}
    body |= {"tool_choice": "none", "response_format": {"type": "text"}, "metadata": {}}
    assert ask(service, CHAT, body).status_code == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "is empty"),
        (b"{", "is not JSON"),
        (b"[1]", "expected an object"),
        (b"\xff\xfe{}", "UTF-16"),
        (b'{"model": NaN}', "NaN"),
        (b'{"n": 1, "n": 2}', "twice"),
        (b"[" * 5000, "deeper than|not JSON"),
    ],
)
def test_malformed_bodies(service, body, message):
    status, param, text = said(ask(service, COMPLETIONS, body))
    assert (status, param) == (400, None)
    assert any(part in text for part in message.split("|"))


def test_other_refusals(service):
    answer = ask(service, COMPLETIONS, {**ASKED, "model": "gpt-9"})
    assert said(answer)[:2] == (404, "model") and "'tiny'" in said(answer)[2]
    assert answer.json()["error"]["code"] == "model_not_found"
    assert said(ask(service, "/v1/models/gpt-9"))[0] == 404
    assert said(ask(service, "/v1/nothing"))[0] == 404
    assert said(ask(service, COMPLETIONS))[0] == 405
    form = ask(service, COMPLETIONS, b"{}", headers={"content-type": "text/plain"})
    assert said(form)[0] == 415
    large = ask(service, COMPLETIONS, b" " * (16 * 2**20 + 1))
    assert said(large)[0] == 413


def test_models(service):
    listed = ask(service, "/v1/models").json()
    assert listed["object"] == "list" and [m["id"] for m in listed["data"]] == [NAME]
    assert ask(service, f"/v1/models/{NAME}").json() == listed["data"][0]
    assert listed["data"][0]["object"] == "model"


def test_what_is_longer_than_any_text_of_the_context_is_not_tokenized(service, monkeypatch):
    reader = dataclasses.replace(service.reader, tokenizer=None)
    monkeypatch.setattr(service, "reader", reader)
    prompt = "a" * (128 * CONTEXT + 1)
    bodies = {COMPLETIONS: {"prompt": prompt}}
    bodies[CHAT] = {"messages": [{"role": "user", "content": prompt}]}
    for path, body in bodies.items():
        answer = ask(service, path, {"model": NAME, **body})
        status, field, message = said(answer)
        assert (status, field) == (400, next(iter(body))) and "8193 characters" in message
        assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_a_chat_without_a_template():
    with contextlib.closing(FakeEngine()) as engine:
        service = service_of(engine)
        body = {"model": NAME, "messages": [{"role": "user", "content": "hi"}]}
        status, param, text = said(ask(service, CHAT, body))
    assert (status, param) == (400, "messages") and "--chat-template=FILE" in text


def test_a_failed_engine():
    with contextlib.closing(FakeEngine(fails_after=5)) as engine:
        service = service_of(engine)
        whole = ask(service, COMPLETIONS, {**ASKED, "n": 2})
        assert said(whole)[0] == 500
        assert said(ask(service, "/health"))[0] == 500
    with contextlib.closing(FakeEngine(fails_after=5)) as engine:
        service = service_of(engine)
        cut = ask(service, COMPLETIONS, {**ASKED, "stream": True})
        *_, last, end = cut.text.split("\n\n")
        assert cut.status_code == 200 and end == "" and "[DONE]" not in cut.text
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"


def test_metrics(service):
    ask_all(service, [(COMPLETIONS, ASKED), (COMPLETIONS, b"{"), ("/nowhere", None)])
    text = ask(service, "/metrics").text
    lines = text.splitlines()
    for line in (
        "stem_compiled_programs 3",
        "stem_ready 1",
        'stem_sequences_total{finish="length"} 1',
        'stem_http_answers_total{path="/v1/completions",status="200"} 1',
        'stem_http_answers_total{path="/v1/completions",status="400"} 1',
        'stem_http_answers_total{path="other",status="404"} 1',
        "stem_first_token_seconds_count 1",
    ):
        assert lines.count(line) == 1, text
    from prometheus_client.parser import text_string_to_metric_families

    families = {family.name: family.type for family in text_string_to_metric_families(text)}
    assert families["stem_http_answers"] == "counter"
    assert families["stem_first_token_seconds"] == "summary"
