"""An engine without a model, for what a server does around one."""

import threading
import time
from collections import Counter, deque

from stem_jax.serving.request import NotServing, QueueFull, Request, Step


class FakeTicket:
    """A request of the fake. made: tokens that were told."""

    def __init__(self, request: Request, on_step):
        self.request, self.on_step = request, on_step
        self.made = 0
        self.cancelled = False
        self.ended = threading.Event()

    def cancel(self) -> None:
        self.cancelled = True


class FakeEngine:
    """Says a text again and again, a byte a token, to so many at a time.

    pause: seconds between tokens. fails_after: tokens of all requests after which it fails.
    """

    def __init__(self, text="abcdef", slots=4, queue=4, pause=0.0, fails_after=None, logprob=-0.5):
        self._text, self._slots, self._queue = text.encode(), slots, queue
        self._pause, self._left, self._logprob = pause, fails_after, logprob
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self.tickets: list[FakeTicket] = []
        self._live: deque[FakeTicket] = deque()
        self._thread: threading.Thread | None = None
        self.failure: BaseException | None = None
        self.finished: Counter = Counter()

    @property
    def most_requests(self) -> int:
        return self._slots + self._queue

    @property
    def ready(self) -> bool:
        return self._thread is not None and self.failure is None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_step) -> FakeTicket:
        return self.submit_all([(request, on_step)])[0]

    def submit_all(self, asked) -> list[FakeTicket]:
        with self._lock:
            if not self.ready:
                raise NotServing("it was not started")
            self._check_room(len(asked))
            tickets = [FakeTicket(request, on_step) for request, on_step in asked]
            self.tickets += tickets
            self._live.extend(tickets)
        return tickets

    def check_room(self) -> None:
        self._check_room(1)

    def _check_room(self, more: int) -> None:
        if len(self._live) + more > self._slots + self._queue:
            raise QueueFull(self._queue, 7.5)

    def stats(self) -> dict[str, float]:
        finished = {f"requests_total_{name}": n for name, n in self.finished.items()}
        return {"running": len(self._live), "compiled_programs": 3, **finished}

    def close(self) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            with self._lock:
                running = list(self._live)[: self._slots]
            for ticket in running:
                self._step(ticket)
            if self.failure is not None:
                for ticket in list(self._live):
                    self._end(ticket, Step.ended("error"))
                return
            time.sleep(self._pause if running else 0.001)

    def _step(self, ticket: FakeTicket) -> None:
        if ticket.cancelled:
            return self._end(ticket, Step.ended("cancelled"))
        token = self._text[ticket.made % len(self._text)]
        ticket.made += 1
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                self.failure = RuntimeError("it broke")
                return None
        top = tuple((97 + n, -1.0 - n) for n in range(ticket.request.top_logprobs or 0))
        if ticket.made == ticket.request.max_new_tokens:
            return self._end(ticket, Step(token, self._logprob, top, "length"))
        return ticket.on_step(Step(token, self._logprob, top))

    def _end(self, ticket: FakeTicket, step: Step) -> None:
        with self._lock:
            self._live.remove(ticket)
        self.finished[step.finish] += 1
        ticket.on_step(step)
        ticket.ended.set()
