"""The routes: OpenAI's completions, chat and models, and what watches over a server."""

import asyncio
import hmac
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stem_jax.serving.api_error import ApiError
from stem_jax.serving.call import Call
from stem_jax.serving.flags import is_loopback
from stem_jax.serving.metrics import Metrics
from stem_jax.serving.reply import Reply, encoded
from stem_jax.serving.service import Service
from stem_jax.serving.shapes import ChatShape, CompletionShape

# Of a body, in bytes: texts of a million tokens fit.
LARGEST_BODY = 16 * 2**20
_BODY_SECONDS = 30.0
# Bodies that are tokenized at a time: more would take the engine's processors.
_READ_AT_A_TIME = 2
# A Host header: a name, or an address, IPv6's in brackets, and perhaps a port.
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:/@\s]+)(?::\d+)?")
_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"
_OTHER = "other"


def make_app(service: Service, key: str | None, *, local: bool = False) -> ASGIApp:
    """The ASGI application.

    Args:
        key: that requests to /v1 have to bring; None: none.
        local: it is for this machine alone. Without a key, requests then have to name it so: a page
            of another site may have its own name lead here, and a browser would send what it asks.
    """
    routes = Routes(service, key, local)
    paths: dict[str, tuple[str, Callable]] = {
        _COMPLETIONS: ("POST", routes.completions),
        _CHAT: ("POST", routes.chat_completions),
        "/v1/models": ("GET", routes.models),
        "/v1/models/{name:path}": ("GET", routes.model),
        "/health": ("GET", routes.health),
        "/metrics": ("GET", routes.metrics),
    }
    app = Starlette(
        routes=[Route(path, call, methods=[method]) for path, (method, call) in paths.items()],
        exception_handlers={
            ApiError: _answer_error,
            HTTPException: _answer_http_error,
            Exception: _answer_failure,
        },
    )
    return _Counted(app, routes.counted)


class Routes:
    """What is done for each path. counted: answers by path and status."""

    def __init__(self, service: Service, key: str | None, local: bool):
        self._service = service
        self._key = None if key is None else key.encode()
        self._local = local
        self._readers = ThreadPoolExecutor(_READ_AT_A_TIME, "read")
        self.counted = Metrics(service)

    async def completions(self, request: Request) -> ASGIApp:
        """A text, or several, for a prompt, or several."""
        call = await self._read(request, self._service.reader.completion)
        return self._reply(call, CompletionShape)

    async def chat_completions(self, request: Request) -> ASGIApp:
        """The next message of a conversation."""
        call = await self._read(request, self._service.reader.chat_completion)
        return self._reply(call, ChatShape)

    async def models(self, request: Request) -> Response:
        """The one model that there is, in a list."""
        self._check_key(request)
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The one model, asked for by its name."""
        self._check_key(request)
        self._service.reader.check_model(request.path_params["name"])
        return _json(self._model())

    async def health(self, request: Request) -> Response:
        """200 while calls are taken."""
        self._service.check_ready()
        return _json({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """Counts, as Prometheus reads them."""
        return Response(self.counted.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _model(self) -> dict[str, Any]:
        service = self._service
        return {
            "id": service.reader.name,
            "object": "model",
            "created": service.created,
            "owned_by": "stem_jax",
            "context_length": service.reader.context,
        }

    async def _read(self, request: Request, read: Callable[[bytes], Call]) -> Call:
        self._check_key(request)
        self._service.check_ready()
        self._service.check_room()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Pages of other sites may send a browser's forms here, but no JSON.
            raise ApiError(
                f"the content type is {kind[:80] or 'missing'}; send application/json", status=415
            )
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                source = await _body(request)
        except TimeoutError as error:
            message = f"the body did not come within {_BODY_SECONDS:.0f} s; send it at once"
            raise ApiError(message, status=408) from error
        except ClientDisconnect as error:
            # Nobody reads it; counted as a failure it would look like the server's own.
            raise ApiError("the client left before the end of the body") from error
        # A long text takes a while to tokenize; others go on meanwhile.
        return await asyncio.get_running_loop().run_in_executor(self._readers, read, source)

    def _reply(self, call: Call, shape: type[CompletionShape] | type[ChatShape]) -> Reply:
        answer = self._service.begin(call)
        return Reply(answer, shape(call, self._service.reader.name, int(time.time())))

    def _check_key(self, request: Request) -> None:
        if self._key is None:
            return self._check_host(request)
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Starlette reads headers as Latin-1, which gives the bytes back as they came.
        same = hmac.compare_digest(given.encode("latin-1").strip(), self._key)
        if scheme.lower() != "bearer" or not same:
            raise ApiError(
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
            )

    def _check_host(self, request: Request) -> None:
        # Not what Starlette makes of it, which is the server's own name where it is none.
        given = request.headers.get("host", "")
        found = _HOST.fullmatch(given)
        name = "" if found is None else found[1].strip("[]")
        if self._local and not is_loopback(name):
            raise ApiError(
                f"the Host header names {given[:80]!r}, and this server is for its own machine; "
                "ask it at localhost, or give it an API key",
                status=421,
            )


async def _body(request: Request) -> bytes:
    source = bytearray()
    async for part in request.stream():
        source += part
        if len(source) > LARGEST_BODY:
            raise ApiError(f"the body is larger than {LARGEST_BODY} bytes; shorten it", status=413)
    return bytes(source)


class _Counted:
    """Counts the answers of an application."""

    def __init__(self, app: Starlette, counted: Metrics):
        self._app = app
        self._counted = counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def heard(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Found by the router; what it does not know is one path.
                route = scope.get("route")
                path = route.path if isinstance(route, Route) else _OTHER
                self._counted.add(path, message["status"])
            await send(message)

        await self._app(scope, receive, heard)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encoded(value), status, headers, media_type="application/json")


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = error.headers()
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _json(error.body(), error.status, headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:80]}: {error.detail}"
    headers = dict(error.headers or {})
    return _json(ApiError(message, status=error.status_code).body(), error.status_code, headers)


async def _answer_failure(request: Request, error: Exception) -> Response:
    # The traceback goes to the log of the server, not to clients.
    return _json(ApiError("the server failed", status=500).body(), 500)
