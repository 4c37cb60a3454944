"""Calls on their way through the engine: from its thread into the event loop, piece by piece."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Iterator

from stem_jax.errors import InputError
from stem_jax.generation.generator import sequence_seeds
from stem_jax.serving.api_error import ApiError
from stem_jax.serving.call import Call
from stem_jax.serving.call_reader import CallReader
from stem_jax.serving.choice import Choice, TextPiece
from stem_jax.serving.engine import Engine
from stem_jax.serving.request import NotServing, QueueFull, Request, Step
from stem_jax.serving.ticket import Ticket
from stem_jax.serving.token_text import TokenTexts

# Until a server that ends or compiles may be asked again, or another one in its place.
_ELSEWHERE_SECONDS = 5.0


class Service:
    """An engine and what reads for its model; takes calls until it is told to drain.

    first_token_seconds: sum over `first_tokens` calls, from the reading to the first token.
    """

    def __init__(self, engine: Engine, reader: CallReader):
        self.engine = engine
        self.reader = reader
        self.created = int(time.time())
        self.draining = False
        self.first_token_seconds = 0.0
        self.first_tokens = 0
        self._texts = TokenTexts(reader.tokenizer)
        self._running: set[Answer] = set()

    @property
    def running(self) -> int:
        """Calls that have begun and are not closed."""
        return len(self._running)

    def check_ready(self) -> None:
        """Raises ApiError as long as no call can be taken."""
        if self.engine.failure is not None:
            raise ApiError("the engine failed", status=500, code="engine_failed")
        if self.draining:
            message = "the server is ending; try another, or later"
        elif not self.engine.ready:
            message = "the server is compiling its programs; try again soon"
        else:
            return
        raise ApiError(message, status=503, code="not_ready", retry_after=_ELSEWHERE_SECONDS)

    def check_room(self) -> None:
        """Raises ApiError where no further call may wait, whatever it asks for."""
        with _said_to_clients(self):
            self.engine.check_room()

    def begin(self, call: Call) -> "Answer":
        """Gives a call to the engine; whoever gets the answer closes it.

        Raises ApiError: not ready, or no room in the queue for all of its completions.
        """
        self.check_ready()
        answer = Answer(self, call, self._texts if call.logprobs is not None else None)
        self._running.add(answer)
        try:
            answer.submit()
        except BaseException:
            answer.close()
            raise
        return answer

    def cancel_all(self) -> None:
        """Ends all calls where they are."""
        for answer in list(self._running):
            answer.cancel()

    def ended(self, answer: "Answer") -> None:
        """Of an answer that is closed."""
        self._running.discard(answer)

    def heard_first(self, seconds: float) -> None:
        """Of a call that has waited so long for its first token."""
        self.first_token_seconds += seconds
        self.first_tokens += 1


class Answer:
    """What the engine gives to one call. prompt_tokens, new_tokens: so far."""

    def __init__(self, service: Service, call: Call, texts: TokenTexts | None):
        self.call = call
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._steps: asyncio.Queue[tuple[int, Step]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._begun = time.monotonic()
        each = [prompt for prompt in call.prompts for _ in range(call.choices)]
        tokenizer = service.reader.tokenizer
        self._choices = [
            Choice(index, tokenizer, prompt.ids, call.stops, texts)
            for index, prompt in enumerate(each)
        ]
        self._prompts = each
        self.prompt_tokens = sum(len(prompt.ids) for prompt in call.prompts)

    @property
    def new_tokens(self) -> int:
        return sum(choice.tokens for choice in self._choices)

    def submit(self) -> None:
        """Asks the engine for every choice. Raises ApiError if it does not take all of them."""
        call, context = self.call, self._service.reader.context
        asked, most = len(self._choices), self._service.engine.most_requests
        if asked > most:
            # Later there is no more room.
            raise ApiError(
                f"{asked} completions are more than the {most} that this server can have at a "
                "time; send several requests",
                param="n" if call.choices > 1 else "prompt",
            )
        # As `generate` has it: a prompt that is given again gets another sample.
        seed = secrets.randbits(63) if call.seed is None else call.seed
        seeds = sequence_seeds(seed, [prompt.ids for prompt in self._prompts])
        requests = []
        for choice, prompt, own in zip(self._choices, self._prompts, seeds, strict=True):
            room = context - len(prompt.ids)
            tokens = room if call.max_tokens is None else min(room, call.max_tokens)
            request = Request(prompt.ids, tokens, call.sampling, own, call.logprobs)
            requests.append((request, self._hear(choice.index)))
        with _said_to_clients(self._service):
            self._tickets = self._service.engine.submit_all(requests)

    async def pieces(self) -> AsyncIterator[TextPiece]:
        """Pieces of all choices as they come, until all have ended.

        Raises ApiError where the engine fails, or the server ends before the answer.
        """
        left = len(self._choices)
        heard = False
        while left:
            index, step = await self._steps.get()
            if step.finish == "error":
                raise ApiError("the engine failed; try again", status=500, code="engine_failed")
            choice = self._choices[index]
            # A stop string has ended it; what the engine made since then is nothing to us.
            if choice.finish is not None:
                continue
            if step.finish == "cancelled":
                raise ApiError("the server ends; try another", status=503, code="not_ready")
            if not heard:
                heard = True
                self._service.heard_first(time.monotonic() - self._begun)
            piece = choice.push(step)
            if piece.finish is not None:
                left -= 1
                # Nothing to a ticket that has ended by itself.
                self._tickets[index].cancel()
            yield piece

    def cancel(self) -> None:
        """Frees the slots; whoever waits for pieces hears that the server ends."""
        for ticket in self._tickets:
            ticket.cancel()

    def close(self) -> None:
        """Frees the slots, and forgets the call."""
        self.cancel()
        self._service.ended(self)

    def _hear(self, index: int):
        """What the engine calls, on its own thread."""

        def heard(step: Step) -> None:
            # The loop may be closed, when nobody waits any more.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._steps.put_nowait, (index, step))

        return heard


@contextlib.contextmanager
def _said_to_clients(service: Service) -> Iterator[None]:
    """What the engine refuses, as an ApiError."""
    try:
        yield
    except QueueFull as full:
        raise ApiError(
            f"the queue is full: {full}",
            status=429,
            code="queue_full",
            retry_after=full.retry_after,
        ) from full
    except NotServing as error:
        # An engine that failed is no server that is not ready.
        service.check_ready()
        raise ApiError(str(error), status=503, code="not_ready") from error
    except InputError as error:
        raise ApiError(str(error)) from error
