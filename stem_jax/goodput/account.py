"""The main thread's time by part. Parts exclude each other, so they sum to all of the time."""

import time
from collections.abc import Callable
from types import TracebackType

# Waiting for the device's step, with its dispatch; for the next batch of text; for rows of
# offloaded tables; for a save; a validation, with its own waits; writing metrics.
COMPUTING, DATA, ROWS, SAVE = "computing", "data", "rows", "save"
VALIDATION, RECORDS = "validation", "records"
# Until the first step of the process's first start is done, and compiling later on; of a later
# start the same, and before it all since the last record of the start before.
START, RESTART = "start", "restart"
# After the last step, beside its save; and what belongs to none of these.
END, OTHER = "end", "other"
PARTS = (COMPUTING, DATA, ROWS, SAVE, VALIDATION, RECORDS, START, RESTART, END, OTHER)

# What these do besides is still of their own part.
_WHOLE = {START, RESTART, VALIDATION}
_INNER = {COMPUTING, DATA, ROWS, RECORDS}


class Account:
    """Counts from a moment on; `part` says for what, and nests: time counts for the innermost."""

    def __init__(
        self,
        began: float | None = None,
        starting: str = START,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Args:
        began: by the clock, in seconds; None: now.
        starting: START or RESTART.
        """
        self._clock = clock
        self.began = clock() if began is None else began
        self.starting = starting
        self._last = self.began
        self._open = [starting]
        self._current = starting
        self._seconds = dict.fromkeys(PARTS, 0.0)

    @property
    def current(self) -> str:
        """The part that time counts for."""
        return self._current

    def part(self, name: str) -> "_Part":
        """A context whose time counts for that part."""
        return _Part(self, name)

    def started(self) -> None:
        """The first step is done."""
        self._base(OTHER)

    def ending(self) -> None:
        """The last one is."""
        self._base(END)

    def read(self) -> tuple[float, dict[str, float]]:
        """Seconds since it began, and by part; they sum up to them."""
        self._turn()
        return self._last - self.began, dict(self._seconds)

    def _base(self, name: str) -> None:
        self._open[0] = name
        self._turn()

    def _enter(self, name: str) -> None:
        self._open.append(name)
        self._turn()

    def _leave(self) -> None:
        self._open.pop()
        self._turn()

    def _turn(self) -> None:
        """Counts what passed for the part until now, and finds the one from now on."""
        now = self._clock()
        self._seconds[self._current] += now - self._last
        self._last = now
        current = self._open[0]
        for name in self._open[1:]:
            if current not in _WHOLE or name not in _INNER:
                current = name
        self._current = current


class _Part:
    __slots__ = ("_account", "_name")

    def __init__(self, account: Account, name: str):
        self._account = account
        self._name = name

    def __enter__(self) -> None:
        self._account._enter(self._name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._account._leave()
