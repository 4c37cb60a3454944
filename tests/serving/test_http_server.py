"""Real sockets: clients that go or stop reading, and how a server ends; the engine is a fake."""

import contextlib
import json
import socket
import threading
import time

import httpx
import openai
import pytest

from stem_jax.errors import InputError
from stem_jax.serving import http_server
from stem_jax.serving.http_server import bound_socket
from tests.serving.fake_engine import FakeEngine
from tests.serving.served import COMPLETIONS, NAME, running, service_of

# Of streams that nobody would wait for.
LONG = 1_000_000
ENDLESS = {"model": NAME, "prompt": "x", "max_tokens": LONG - 10}


def served(pause=0.001, **options):
    """A service of an engine that takes a quarter of an hour for `ENDLESS`."""
    engine = FakeEngine(pause=pause, **options)
    return engine, service_of(engine, context=LONG)


def posted(address: str, body: dict, receive_buffer: int | None = None) -> socket.socket:
    """A connection that has sent a request."""
    host, _, port = address.removeprefix("http://").partition(":")
    client = socket.socket()
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.connect((host, int(port)))
    content = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    client.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    return client


def until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_openai_client():
    engine, service = served(pause=0.0)
    with contextlib.closing(engine), running(service, key="k") as (address, *_):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="k", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == [NAME]
            asked = {"model": NAME, "prompt": "x", "max_tokens": 8}
            assert client.completions.create(**asked).choices[0].text == "abcdefab"
            pieces = list(client.completions.create(**asked, stream=True))
            assert "".join(piece.choices[0].text for piece in pieces) == "abcdefab"
            with pytest.raises(openai.BadRequestError) as refused:
                client.completions.create(**asked, best_of=2)
            assert refused.value.param == "best_of"
            with pytest.raises(openai.NotFoundError):
                client.completions.create(**{**asked, "model": "gpt"})
        with (
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0) as other,
            pytest.raises(openai.AuthenticationError),
        ):
            other.models.list()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slot(stream):
    engine, service = served()
    with contextlib.closing(engine), running(service) as (address, *_):
        client = posted(address, {**ENDLESS, "stream": stream, "n": 2})
        until(lambda: len(engine.tickets) == 2 and all(t.made for t in engine.tickets))
        assert service.running == 1
        client.close()
        assert all(ticket.ended.wait(60) for ticket in engine.tickets)
        until(lambda: service.running == 0)
    assert engine.finished == {"cancelled": 2}


def test_a_client_that_stops_reading_loses_its_slot_and_others_do_not():
    engine, service = served()
    with contextlib.closing(engine), running(service, write_seconds=0.5) as (address, *_):
        stuck = posted(address, {**ENDLESS, "stream": True}, receive_buffer=4096)
        reading = {**ENDLESS, "max_tokens": 1500, "stream": True}
        with httpx.Client(base_url=address, timeout=60) as client:
            # Longer than the time for a client that reads nothing.
            text = client.post(COMPLETIONS, json=reading).text
        assert text.endswith("data: [DONE]\n\n")
        until(lambda: engine.tickets)
        lost = next(t for t in engine.tickets if t.request.max_new_tokens > 1500)
        assert lost.ended.wait(60) and lost.made < LONG // 10
        until(lambda: service.running == 0)
        stuck.close()
    assert engine.finished == {"cancelled": 1, "length": 1}


def test_told_to_stop_it_ends_what_runs_and_takes_nothing_new():
    engine, service = served()
    with contextlib.closing(engine), running(service) as (address, serving, ended):
        found = []
        body = {**ENDLESS, "max_tokens": 500}
        with httpx.Client(base_url=address, timeout=60) as client:
            thread = threading.Thread(
                target=lambda: found.append(client.post(COMPLETIONS, json=body))
            )
            thread.start()
            until(lambda: engine.tickets)
            serving.stop()
            refused = httpx.post(address + COMPLETIONS, json=body)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
            assert httpx.get(address + "/health").status_code == 503
            thread.join(60)
        assert len(found[0].json()["choices"][0]["text"]) == 500
        assert ended.result(60) is None
        with pytest.raises(httpx.ConnectError):
            httpx.get(address + "/health")


@pytest.mark.parametrize("how", ["again", "timeout"])
def test_its_patience_ends(how, capfd):
    engine, service = served()
    seconds = 60.0 if how == "again" else 0.2
    with (
        contextlib.closing(engine),
        running(service, drain_seconds=seconds) as (address, serving, ended),
    ):
        client = posted(address, ENDLESS)
        until(lambda: engine.tickets)
        serving.stop()
        if how == "again":
            serving.stop()
        assert ended.result(60) is None
        assert b"503" in client.recv(100)
        client.close()
    assert capfd.readouterr().err == "note: 1 requests were cut off\n"


def test_an_engine_that_fails_ends_the_server():
    engine, service = served(fails_after=50)
    with contextlib.closing(engine), running(service) as (address, _, ended):
        answer = httpx.post(address + COMPLETIONS, json=ENDLESS, timeout=60)
        assert answer.status_code == 500
        with pytest.raises(RuntimeError, match="it broke"):
            ended.result(60)


def test_a_client_that_goes_within_its_body_is_no_failure(caplog):
    engine, service = served()
    with contextlib.closing(engine), running(service) as (address, *_):
        host, _, port = address.removeprefix("http://").partition(":")
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        with socket.create_connection((host, int(port))) as client:
            client.sendall(f"{head}content-length: 100\r\n\r\n{{".encode())
        counted = f'stem_http_answers_total{{path="{COMPLETIONS}",status='
        until(lambda: counted in httpx.get(address + "/metrics").text)
        assert f'{counted}"400"}} 1' in httpx.get(address + "/metrics").text
    assert not caplog.records


def test_connections_without_a_request_are_ended(monkeypatch):
    monkeypatch.setattr(http_server, "_IDLE_SECONDS", 0.3)
    engine, service = served()
    with contextlib.closing(engine), running(service) as (address, *_):
        host, _, port = address.removeprefix("http://").partition(":")
        with contextlib.ExitStack() as stack:
            silent, slow = (
                stack.enter_context(socket.create_connection((host, int(port)), timeout=20))
                for _ in range(2)
            )
            slow.sendall(b"GET /health HTTP/1.1\r\n")
            assert silent.recv(1) == slow.recv(1) == b""
        # An answer may take longer.
        answer = httpx.post(address + COMPLETIONS, json={**ENDLESS, "max_tokens": 500}, timeout=60)
        assert answer.status_code == 200 and answer.elapsed.total_seconds() > 0.3


def test_addresses():
    own = bound_socket("127.0.0.1", 0)
    with own:
        port = own.getsockname()[1]
        own.listen()
        with pytest.raises(InputError, match=f"--port={port} of --host=127.0.0.1 cannot be had"):
            bound_socket("127.0.0.1", port)
    with pytest.raises(InputError, match="is no address here"):
        bound_socket("no.such.host.invalid", 0)
