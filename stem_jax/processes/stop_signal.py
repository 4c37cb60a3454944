"""SIGTERM and SIGINT as a wish to stop, at the same place in every process."""

import signal

import jax
from jax.experimental import multihost_utils

from stem_jax.processes.start_stop import told_to_stop


class StopSignal:
    """Remembers SIGTERM and SIGINT instead of dying of them; the previous handlers come back.

    With several processes JAX's preemption service hears SIGTERM, on whichever of them it arrives,
    and picks a question that none has asked yet: they ask the same ones in the same order.
    """

    def __init__(self):
        self._received = False
        self._agreed = False
        self._asked = 0
        self._previous = {}
        self._many = jax.process_count() > 1

    def __call__(self) -> bool:
        """Whether to stop here. Every process asks at the same places, and once told, it stays so.

        Asking waits for nothing.
        """
        if self._many and not self._agreed:
            self._asked += 1
            self._agreed = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._agreed if self._many else self._received

    def __enter__(self) -> "StopSignal":
        # The service's own handler of SIGTERM stays where it is.
        heard = [signal.SIGINT] if self._many else [signal.SIGTERM, signal.SIGINT]
        for number in heard:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            # A run that has made its steps ends by itself.
            over = handler is told_to_stop
            signal.signal(number, signal.SIG_IGN if over else handler)

    def _remember(self, number, frame) -> None:
        self._received = True
        if self._many:
            signal.raise_signal(signal.SIGTERM)
