"""A server in this process: asked without sockets, or by clients of its own."""

import asyncio
import concurrent.futures
import contextlib
import functools
import json
import threading
from collections.abc import Iterator

import httpx

from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.serving.app import make_app
from stem_jax.serving.call_reader import CallReader
from stem_jax.serving.http_server import Serving, bound_socket
from stem_jax.serving.service import Service

BYTES = load_tokenizer("bytes")
CONTEXT = 64
NAME = "tiny"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def service_of(engine, chat=None, context: int = CONTEXT, **options) -> Service:
    """A service of the bytes tokenizer whose engine runs."""
    engine.start()
    return Service(engine, CallReader(NAME, BYTES, chat, context, 258, **options))


def ask(service: Service, path: str, body=None, key: str | None = None, **options):
    """One answer. body: JSON to post, or bytes; None: a GET."""
    return ask_all(service, [(path, body)], key, **options)[0]


def ask_all(service: Service, requests, key: str | None = None, **options) -> list[httpx.Response]:
    """The answers to requests that are sent at once."""
    return _ask(_app(service, key), requests, **options)


def ask_app(app, path: str, body, headers: dict[str, str]) -> httpx.Response:
    """One answer of an application that was made already."""
    return _ask(app, [(path, body)], headers=headers)[0]


def _ask(app, requests, **options) -> list[httpx.Response]:
    async def send() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await asyncio.gather(*(_send(client, *one, **options) for one in requests))

    return asyncio.run(send())


@functools.lru_cache(maxsize=1)
def _app(service: Service, key: str | None):
    """The same for several questions: it counts them."""
    return make_app(service, key)


def _send(client: httpx.AsyncClient, path: str, body, **options):
    if body is None:
        return client.get(path, **options)
    if isinstance(body, bytes):
        headers = {"content-type": "application/json", **options.pop("headers", {})}
        return client.post(path, content=body, headers=headers, **options)
    return client.post(path, json=body, **options)


def events(answer: httpx.Response) -> list[dict]:
    """The chunks of a stream, which is whole."""
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@contextlib.contextmanager
def running(
    service: Service, write_seconds: float = 30.0, drain_seconds: float = 30.0, key=None
) -> Iterator[tuple[str, Serving, concurrent.futures.Future]]:
    """A server on a port of its own, in a thread; its address, itself, and how it ended."""
    own = bound_socket("127.0.0.1", 0)
    compiled: concurrent.futures.Future = concurrent.futures.Future()
    compiled.set_result(None)
    ready, ended = threading.Event(), concurrent.futures.Future()
    found: list[Serving] = []

    async def main() -> None:
        serving = Serving(service, make_app(service, key), write_seconds, drain_seconds)
        found.append(serving)
        await serving.run(own, compiled, ready.set)

    def run() -> None:
        try:
            ended.set_result(asyncio.run(main()))
        except BaseException as error:
            ended.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    port = own.getsockname()[1]
    thread.start()
    assert ready.wait(60)
    try:
        yield f"http://127.0.0.1:{port}", found[0], ended
    finally:
        found[0].stop()
        found[0].stop()
        thread.join(60)
        assert not thread.is_alive()
