"""An answer on its way out: whole as JSON, or as a stream of events; a client that goes ends it."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from stem_jax.serving.api_error import ApiError
from stem_jax.serving.service import Answer
from stem_jax.serving.shapes import Shape, WholeChoice, usage

_DONE = b"data: [DONE]\n\n"


def encoded(value: Any) -> bytes:
    """JSON as it is sent; a lone surrogate, which has no UTF-8 form, by its number."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


async def send_json(send: Send, status: int, value: Any, headers: Mapping[str, str]) -> None:
    """Sends a whole answer."""
    body = encoded(value)
    own = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    await send(_start(status, own))
    await send({"type": "http.response.body", "body": body})


class Reply:
    """Sends an answer, and closes it whatever happens."""

    def __init__(self, answer: Answer, shape: Shape):
        self._answer = answer
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI application; the body of the request has been read."""
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._answer.close()
            for task in (sending, leaving):
                if not task.done():
                    task.cancel()
            results = await asyncio.gather(sending, leaving, return_exceptions=True)
        for error in results:
            if isinstance(error, Exception):
                raise error

    async def _send(self, send: Send) -> None:
        send_all = self._send_stream if self._answer.call.stream else self._send_whole
        await send_all(send)

    async def _send_whole(self, send: Send) -> None:
        call = self._answer.call
        choices = [WholeChoice() for _ in range(len(call.prompts) * call.choices)]
        try:
            async for piece in self._answer.pieces():
                choices[piece.choice].add(piece)
        except ApiError as error:
            return await send_json(send, error.status, error.body(), error.headers())
        await send_json(send, 200, {**self._shape.whole(choices), "usage": self._usage()}, {})

    async def _send_stream(self, send: Send) -> None:
        events = self._events()
        try:
            # Before it nothing is said, so what fails until then has a status of its own.
            first = await anext(events)
        except ApiError as error:
            return await send_json(send, error.status, error.body(), error.headers())
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        # Proxies that collect answers would hold a stream back.
        await send(_start(200, headers | {"x-accel-buffering": "no"}))
        await send(_more(first))
        try:
            async for event in events:
                await send(_more(event))
        except ApiError as error:
            await send(_more(_event(error.body())))
        await send({"type": "http.response.body", "body": b""})

    async def _events(self) -> AsyncIterator[bytes]:
        wants = self._answer.call.usage
        # As OpenAI has it: every chunk has the field where the last one has a value.
        empty = {"usage": None} if wants else {}
        opened = False
        async for piece in self._answer.pieces():
            chunks = [] if opened else self._shape.openings()
            opened = True
            chunk = self._shape.chunk(piece)
            for said in [*chunks, *([chunk] if chunk else [])]:
                yield _event({**said, **empty})
        if wants:
            yield _event({**self._shape.closing(), "usage": self._usage()})
        yield _DONE

    def _usage(self) -> dict[str, int]:
        return usage(self._answer.prompt_tokens, self._answer.new_tokens)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _start(status: int, headers: Mapping[str, str]) -> Message:
    listed = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": listed}


def _more(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}


def _event(value: Any) -> bytes:
    return b"data: " + encoded(value) + b"\n\n"
