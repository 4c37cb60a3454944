"""Continuous batching: requests join and leave a batch of fixed shape between its steps.

There are so many slots, each with room for one sequence of the whole context. A step makes one
token of every slot that is taken; between two steps prompts that wait are read into free slots, a
bounded number of tokens. All shapes are compiled by `start`.

Stages by step distance: what the devices made in step t is read by the host while they compute
step t+1. A sequence that ends with a stop id has been in step t+1 too, of which nothing is told.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from stem_jax.config import Config
from stem_jax.data.tokenizer import Tokenizer
from stem_jax.errors import InputError
from stem_jax.generation.buckets import bucket, within
from stem_jax.generation.generator import Generator
from stem_jax.serving.books import Books
from stem_jax.serving.programs import Drawn, Programs, Wanted
from stem_jax.serving.prompt_parts import PromptPart, PromptParts
from stem_jax.serving.request import Finish, NotServing, Request, Step
from stem_jax.serving.slot_memory import check_slots, device_bytes, free_bytes
from stem_jax.serving.slot_state import SlotState
from stem_jax.serving.ticket import Ticket
from stem_jax.tables.row_source import RowSource
from stem_jax.training.blueprint import Params

_LOG = logging.getLogger(__name__)
# Places of each slot that a step looks at, at least; then twice as many. Cut out, they are copied:
# on CPUs half of the context took longer than all of it.
_SMALLEST_WINDOW, _WINDOW_PAYS = 128, 4


class Engine:
    """Answers requests from one set of parameters, many at a time, on a thread of its own.

    failure: what ended the thread, None as long as nothing did.
    """

    def __init__(
        self,
        config: Config,
        params: Params,
        rows: Mapping[str, RowSource],
        tokenizer: Tokenizer | None,
        mesh: Mesh | None = None,
        *,
        slots: int = 8,
        queue: int = 64,
    ):
        """See `Generator`.

        Args:
            slots: sequences at a time.
            queue: requests that may wait for a slot.

        Raises:
            InputError: no slots, or a number that does not divide over the shards of the batch.
        """
        self.generator = Generator(config, params, rows, tokenizer, mesh)
        shards = self.generator.shards
        if slots < 1 or slots % shards:
            raise InputError(
                f"slots={slots} must be at least 1 and a multiple of the {shards} parts that the "
                "devices divide a batch into"
            )
        room = self.generator.rows.most_tokens
        if room is not None and room < max(slots, shards):
            raise InputError(
                f"slots={slots} sequences may ask for rows of as many tokens at a time, and the "
                f"rows kept on the device are those of {room}; give more --resident-rows, or fewer "
                "slots"
            )
        if queue < 0:
            raise InputError(f"queue={queue} must be at least 0")
        self.failure: BaseException | None = None
        self.steps = 0
        self._parts = PromptParts(self.generator.context, slots, shards, room)
        self._books = Books(slots, queue, self._parts)
        self._programs = Programs(self.generator, slots)
        stops = () if tokenizer is None else tokenizer.special.stop_ids
        self._stop_ids = frozenset(stops)
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._draining = self._closing = False
        # Results that the host has not read, and whose they are; the oldest first.
        self._under_way: deque[tuple[Drawn, list[tuple[int, Ticket]]]] = deque()

    @property
    def most_requests(self) -> int:
        """That it can have at a time."""
        return self._books.most

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        alive = self._thread is not None and self._thread.is_alive()
        return alive and self.failure is None and not (self._draining or self._closing)

    def start(self) -> None:
        """Compiles every shape, and begins to serve; once.

        Raises:
            InputError: the slots do not fit into the devices' memory.
        """
        assert self._thread is None
        state = self._compile()
        self._thread = threading.Thread(target=self._run, args=(state,), name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, on_step: Callable[[Step], None]) -> Ticket:
        """Puts a request behind those that wait; see `submit_all`."""
        return self.submit_all([(request, on_step)])[0]

    def submit_all(self, asked: Sequence[tuple[Request, Callable[[Step], None]]]) -> list[Ticket]:
        """Puts requests behind those that wait: all of them, or none.

        Args:
            asked: each with its on_step, which hears every new token, on the engine's thread, which
                it must not hold up; the last has `finish`.

        Raises:
            InputError: a prompt that leaves no room in the context, or an unknown id.
            QueueFull: not so many may wait.
            NotServing: the engine takes no requests, now or ever again.
        """
        tickets = [self._ticket(request, on_step) for request, on_step in asked]
        with self._lock:
            if not self.ready:
                raise NotServing(
                    f"the engine takes no requests: {self._why_not()}"
                ) from self.failure
            self._books.add(tickets)
            self._lock.notify_all()
        return tickets

    def check_room(self) -> None:
        """Raises QueueFull where not even one more request may wait."""
        with self._lock:
            self._books.check_room(1)

    def stats(self) -> dict[str, float]:
        """Counts, as of now; those that end in `_total` only grow."""
        with self._lock:
            books = self._books
            finished = {f"requests_total_{name}": books.finished[name] for name in _FINISHES}
            return {
                "running": len(books.running),
                "waiting": len(books.waiting),
                "slots": len(books.slots),
                "prompt_tokens_total": books.prompt_tokens,
                "new_tokens_total": books.new_tokens,
                "steps_total": self.steps,
                "compiled_programs": self._programs.compiled,
                **finished,
            }

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no new requests, and waits until those that it has are done.

        Args:
            timeout: seconds to wait at most; None: as long as it takes.

        Returns:
            Whether they are.
        """
        with self._lock:
            self._draining = True
            return self._lock.wait_for(lambda: self._books.idle or not self._alive(), timeout)

    def close(self) -> None:
        """Ends the thread; requests that it still has are cancelled. The rows are the caller's."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _ticket(self, request: Request, on_step: Callable[[Step], None]) -> Ticket:
        self.generator.check([request.prompt_ids], request.max_new_tokens)
        limit = min(request.max_new_tokens, self.generator.context - len(request.prompt_ids))
        stop_ids = self._stop_ids | frozenset(request.stop_ids)
        return Ticket(request, on_step, limit, stop_ids, self._cancel)

    def _alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and self.failure is None

    def _why_not(self) -> str:
        if self.failure is not None:
            return f"it has failed ({self.failure!r})"
        if self._draining or self._closing:
            return "it is being shut down"
        return "it was not started"

    def _cancel(self, ticket: Ticket) -> None:
        with self._lock:
            if ticket.finish is None and self._alive():
                self._books.cancelled.append(ticket)
                self._lock.notify_all()

    def _compile(self) -> SlotState:
        """The empty state, after every program has run on it."""
        generator, slots = self.generator, len(self._books.slots)
        generator.rows.fix_shapes(max(slots, self._parts.most_tokens))
        tokens_Bx1 = generator.place(np.ones((slots, 1), np.int32))
        first_rows = generator.rows.serve(tokens_Bx1)
        mesh = generator.mesh
        devices = jax.local_devices()[:1] if mesh is None else mesh.local_devices
        needed = device_bytes(self._programs.shapes(first_rows))
        check_slots(needed, free_bytes(devices), slots, generator.context)
        state = self._programs.empty(first_rows)
        for shape in self._parts.shapes():
            _, state = self._read(self._parts.nothing(*shape), state)
        for window in self._windows():
            _, state = self._step([], state, window)
        return jax.block_until_ready(state)

    def _run(self, state: SlotState) -> None:
        finish: Finish = "cancelled"
        try:
            self._serve(state)
        except BaseException as error:
            _LOG.exception("the engine has failed")
            finish, self.failure = "error", error
        with self._lock:
            self._closing = True
            books = self._books
            left = [*books.running, *books.waiting]
        for ticket in left:
            self._finish(ticket, finish)

    def _serve(self, state: SlotState) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._closing or not self._books.idle)
                if self._closing:
                    return
                cancelled = self._books.take_cancelled()
            for ticket in cancelled:
                self._finish(ticket, "cancelled")
            state = self._prompts(state)
            with self._lock:
                active = self._books.active()
            if active:
                window = self._window(max(ticket.places for _, ticket in active))
                drawn, state = self._step(active, state, window)
                self._follow(drawn, active)
            newest = 1 if active else 0
            while len(self._under_way) > newest:
                self._tell(*self._under_way.popleft())

    def _prompts(self, state: SlotState) -> SlotState:
        """Reads prompts into slots: as many tokens as fit between two steps."""
        left = self._parts.most_tokens
        while left > 0:
            with self._lock:
                part = self._books.next_part()
            if part is None:
                break
            drawn, state = self._read(part, state)
            self._follow(drawn, [(n, t) for n, t in enumerate(part.tickets) if t.is_read])
            left -= part.tokens.size
        return state

    def _read(self, part: PromptPart, state: SlotState) -> tuple[Drawn, SlotState]:
        generator, place = self.generator, self.generator.place
        within_PxL = place(within(part.lengths, part.tokens.shape[1]))
        before = None
        if not part.begins and state.before is not None:
            before = state.before[place(np.minimum(part.slots, len(self._books.slots) - 1))]
        rows = generator.rows.serve(place(part.tokens), within_PxL, before)
        program = self._programs.begin if part.begins else self._programs.go_on
        wanted = Wanted.by(ticket.request for ticket in part.tickets)
        call = rows, part.tokens, part.lengths, part.slots, part.settings, wanted
        return program(generator.params, *call, state=state)

    def _windows(self) -> list[int]:
        """Of all steps that there will ever be."""
        return sorted({self._window(places) for places in range(1, self.generator.context + 1)})

    def _window(self, places: int) -> int:
        """Of each slot, how many places a step looks at where sequences have so many."""
        window, context = max(_SMALLEST_WINDOW, bucket(places)), self.generator.context
        return window if _WINDOW_PAYS * window <= context else context

    def _step(
        self, active: list[tuple[int, Ticket]], state: SlotState, window: int
    ) -> tuple[Drawn, SlotState]:
        generator = self.generator
        active_B = np.zeros(len(self._books.slots), bool)
        active_B[[slot for slot, _ in active]] = True
        rows = generator.rows.serve(state.tokens, before_BxR=state.before)
        wanted = Wanted.by(ticket.request for _, ticket in active)
        self.steps += bool(active)
        call = generator.params, rows, active_B, wanted
        return self._programs.decode(*call, state=state, window=window)

    def _follow(self, drawn: Drawn, whose: list[tuple[int, Ticket]]) -> None:
        with self._lock:
            self._books.ask([ticket for _, ticket in whose])
        if whose:
            self._under_way.append((drawn, whose))

    def _tell(self, drawn: Drawn, whose: list[tuple[int, Ticket]]) -> None:
        """Waits for what was drawn, and says it."""
        tokens, wanted = np.asarray(drawn.tokens).tolist(), Wanted.by(t.request for _, t in whose)
        logprobs = np.asarray(drawn.logprobs).tolist() if wanted >= Wanted.LOGPROBS else None
        tops = _tops(drawn) if wanted == Wanted.TOP else None
        told = 0
        for place, ticket in whose:
            if ticket.finish is not None:
                continue
            told += 1
            number = ticket.request.top_logprobs
            logprob = math.nan if logprobs is None or number is None else logprobs[place]
            top = tops[place][:number] if tops and number else ()
            ticket.tell(tokens[place], logprob, top)
            if ticket.finish is not None:
                with self._lock:
                    self._forget(ticket)
        with self._lock:
            self._books.new_tokens += told

    def _finish(self, ticket: Ticket, finish: Finish) -> None:
        ticket.end(finish)
        with self._lock:
            self._forget(ticket)

    def _forget(self, ticket: Ticket) -> None:
        """Takes a ticket that has ended out of the books; the lock is held."""
        self._books.remove(ticket)
        self._lock.notify_all()


_FINISHES: tuple[Finish, ...] = ("stop", "length", "cancelled", "error")


def _tops(drawn: Drawn) -> list[tuple[tuple[int, float], ...]]:
    ids, values = np.asarray(drawn.top_ids).tolist(), np.asarray(drawn.top_logprobs).tolist()
    return [tuple(zip(*line, strict=True)) for line in zip(ids, values, strict=True)]
