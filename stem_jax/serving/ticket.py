"""A request on its way through the engine."""

import logging
from collections.abc import Callable

from stem_jax.serving.request import Finish, Request, Step

_LOG = logging.getLogger(__name__)


class Ticket:
    """What `Engine.submit` gives back.

    The fields belong to the engine's thread. limit: new tokens at most. slot: where it is; None
    while it waits, and after its last token was asked for. read: tokens of the prompt that were
    read. asked: new tokens asked of the devices. told: of these, those that `on_step` has heard.
    finish: None until it has heard the last.
    """

    def __init__(
        self,
        request: Request,
        on_step: Callable[[Step], None],
        limit: int,
        stop_ids: frozenset[int],
        on_cancel: Callable[["Ticket"], None],
    ):
        self.request = request
        self.limit = limit
        self.slot: int | None = None
        self.read = self.asked = self.told = 0
        self.finish: Finish | None = None
        self._on_step, self._on_cancel = on_step, on_cancel
        self._stop_ids = stop_ids

    def cancel(self) -> None:
        """Ends the request at the next step, from any thread; once it has ended, nothing."""
        self._on_cancel(self)

    @property
    def is_read(self) -> bool:
        """Whether all of the prompt was read."""
        return self.read == len(self.request.prompt_ids)

    @property
    def places(self) -> int:
        """Places of a cache that its sequence has, with the token that is asked for next."""
        return self.read + self.asked

    def tell(self, token: int, logprob: float, top: tuple[tuple[int, float], ...]) -> None:
        """The next token; which may be the last."""
        self.told += 1
        if token in self._stop_ids:
            self.finish = "stop"
        elif self.told == self.limit:
            self.finish = "length"
        self._say(Step(token, logprob, top, self.finish))

    def end(self, finish: Finish) -> None:
        """The end without a further token."""
        self.finish = finish
        self._say(Step.ended(finish))

    def _say(self, step: Step) -> None:
        try:
            self._on_step(step)
        except Exception:
            # Whoever asked for this one cannot hear; the others can.
            _LOG.exception("a request's on_step failed; its slot is freed")
            self.finish = self.finish or "error"
