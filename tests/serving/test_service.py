"""A service that has no room, is not ready, or whose model is broken; the engine is a fake."""

import contextlib
import dataclasses
import math

import pytest

from stem_jax.serving.request import Request
from tests.serving.fake_engine import FakeEngine
from tests.serving.served import COMPLETIONS, ask, ask_all, service_of
from tests.serving.test_app import ASKED, said


@pytest.mark.parametrize("stream", [True, False])
def test_a_model_without_probabilities(stream):
    with contextlib.closing(FakeEngine(logprob=math.nan)) as engine:
        service = service_of(engine)
        answer = ask(service, COMPLETIONS, {**ASKED, "logprobs": 0, "stream": stream})
        assert said(answer)[0] == 500 and "NaN" in said(answer)[2] and service.running == 0
        assert ask(service, COMPLETIONS, {**ASKED, "stream": stream}).status_code == 200


@pytest.mark.parametrize(("field", "value"), [("n", 3), ("prompt", ["a", "b", "c"])])
def test_more_than_there_is_ever_room_for(field, value):
    with contextlib.closing(FakeEngine(slots=1, queue=1)) as engine:
        answer = ask(service_of(engine), COMPLETIONS, {**ASKED, field: value})
        status, param, text = said(answer)
        assert (status, param) == (400, field) and "3 completions are more than the 2" in text
        assert not engine.tickets and "retry-after" not in answer.headers


def test_a_full_queue():
    with contextlib.closing(FakeEngine(slots=1, queue=2, pause=0.01)) as engine:
        service = service_of(engine)
        body = {**ASKED, "max_tokens": 60, "n": 2}
        answers = ask_all(service, [(COMPLETIONS, body)] * 2)
        taken, refused = sorted(answers, key=lambda answer: answer.status_code)
        assert taken.status_code == 200
        assert said(refused)[0] == 429 and refused.headers["retry-after"] == "8"
        # All of a request, or nothing of it.
        assert all(ticket.ended.wait(30) for ticket in engine.tickets)
        assert engine.finished == {"length": 2}
        assert ask(service, COMPLETIONS, ASKED).status_code == 200


def test_no_text_is_read_for_a_full_queue(monkeypatch):
    with contextlib.closing(FakeEngine(slots=1, queue=0, pause=0.01)) as engine:
        service = service_of(engine)
        held = engine.submit(Request((1,), 1000), lambda step: None)
        reader = dataclasses.replace(service.reader, tokenizer=None)
        monkeypatch.setattr(service, "reader", reader)
        assert said(ask(service, COMPLETIONS, ASKED))[0] == 429
        held.cancel()


def test_before_and_after():
    engine = FakeEngine()
    with contextlib.closing(engine):
        service = service_of(engine)
        assert ask(service, "/health").status_code == 200
        service.draining = True
        for path, body in (("/health", None), (COMPLETIONS, ASKED)):
            answer = ask(service, path, body)
            assert said(answer)[0] == 503 and answer.headers["retry-after"] == "5"
    engine = FakeEngine()
    service.engine, service.draining = engine, False
    assert said(ask(service, "/health"))[2].startswith("the server is compiling")
    assert said(ask(service, COMPLETIONS, ASKED))[0] == 503
