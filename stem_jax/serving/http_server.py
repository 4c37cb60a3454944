"""A service on a socket: until it is told to stop, its engine fails, or its patience ends."""

import asyncio
import concurrent.futures
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from stem_jax.errors import InputError
from stem_jax.serving.service import Service

# Kept by the kernel of what a client does not read, in bytes; it takes twice as much.
_SEND_BUFFER = 32 * 2**10
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOOK_SECONDS = 0.1
# Of connections without a request. Clients of httpx end theirs after 5: who asks again just when
# the server ends one gets an error.
_IDLE_SECONDS = 30
# For what is sent after the last answer has ended.
_LAST_SECONDS = 5


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket at an address, which takes no connections yet. port: 0 for any.

    Raises InputError if there is no such address, or another has it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"--host={host} is no address here ({error}); give another") from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise InputError(
            f"--port={port} of --host={host} cannot be had ({error.strerror}); choose another"
        ) from error
    return made


def protocol(write_seconds: float) -> type[H11Protocol]:
    """HTTP/1.1 that ends connections of clients that read nothing for so long.

    And of those that do not send the head of a request: uvicorn waits for it without end.
    """

    class Protocol(H11Protocol):
        _stuck: asyncio.TimerHandle | None = None
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Nothing is to be kept here: what the kernel does not take is a client's silence."""
            transport.set_write_buffer_limits(high=0)
            own = transport.get_extra_info("socket")
            own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            super().connection_made(transport)
            self._await_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._await_head()

        def pause_writing(self) -> None:
            """Bytes are left that the kernel does not take."""
            super().pause_writing()
            self._stuck = self.loop.call_later(write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            """It has taken them."""
            self._forget()
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            self._forget_late()
            super().connection_lost(exc)

        def _await_head(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._forget_late()
            elif self._late is None:
                self._late = self.loop.call_later(_IDLE_SECONDS, self.transport.abort)

        def _forget_late(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _forget(self) -> None:
            if self._stuck is not None:
                self._stuck.cancel()
                self._stuck = None

    return Protocol


class HttpServer(uvicorn.Server):
    """uvicorn without its own signals."""

    def __init__(self, app: ASGIApp, write_seconds: float):
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol(write_seconds),
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_IDLE_SECONDS,
                timeout_graceful_shutdown=_LAST_SECONDS,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """They are heard by `Serving`."""
        yield


class Serving:
    """A service while it runs. stop: told once it drains, told twice it ends."""

    def __init__(self, service: Service, app: ASGIApp, write_seconds: float, drain_seconds: float):
        self._service = service
        self._server = HttpServer(app, write_seconds)
        self._drain_seconds = drain_seconds
        self._told = asyncio.Event()
        self._told_again = asyncio.Event()

    def stop(self) -> None:
        """Takes no more calls, and ends when those that run have; at once the second time."""
        (self._told_again if self._told.is_set() else self._told).set()
        self._service.draining = True

    async def run(
        self,
        own: socket.socket,
        compiling: "concurrent.futures.Future[object]",
        on_ready: Callable[[], None],
    ) -> None:
        """Serves on a socket until it is stopped.

        Args:
            compiling: the engine's start; what it raises ends the server.

        Raises:
            Exception: what the engine failed with.
        """
        serving = asyncio.ensure_future(self._server.serve([own]))
        try:
            await self._watch(serving, asyncio.wrap_future(compiling), on_ready)
        finally:
            self._service.draining = True
            self._service.cancel_all()
            self._server.should_exit = True
            await serving

    async def _watch(
        self,
        serving: "asyncio.Future[None]",
        compiling: "asyncio.Future[object]",
        on_ready: Callable[[], None],
    ) -> None:
        said = False
        while not self._told.is_set() and not serving.done():
            if compiling.done() and not said:
                compiling.result()
                said = True
                on_ready()
            self._check_engine()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._told.wait(), _LOOK_SECONDS)
        await self._drain()

    def _check_engine(self) -> None:
        if self._service.engine.failure is not None:
            raise self._service.engine.failure

    async def _drain(self) -> None:
        end = asyncio.get_running_loop().time() + self._drain_seconds
        while self._service.running and not self._told_again.is_set():
            self._check_engine()
            if asyncio.get_running_loop().time() > end:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._told_again.wait(), _LOOK_SECONDS)
        if self._service.running:
            print(f"note: {self._service.running} requests were cut off", file=sys.stderr)


def serve(
    service: Service,
    app: ASGIApp,
    own: socket.socket,
    compiling: "concurrent.futures.Future[object]",
    write_seconds: float,
    drain_seconds: float,
    on_ready: Callable[[], None],
) -> None:
    """Serves in this thread, the main one, until SIGTERM or SIGINT; see `Serving`."""

    async def main() -> None:
        serving = Serving(service, app, write_seconds, drain_seconds)
        for number in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, serving.stop)
        await serving.run(own, compiling, on_ready)

    asyncio.run(main())
