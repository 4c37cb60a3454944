"""SIGTERM while a run starts: it ends before its first step, as any stop ends it.

Python hears it between two of its own steps: what was compiled or read in C++ meanwhile is waited
for. From the first step on, `stop_signal` hears it.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

from stem_jax.errors import ToldToStop

# The process that it was told to, of which forked ones are none.
_told: list[int] = []


def told_to_stop(number: int, frame: object) -> None:
    """The handler: raises ToldToStop, once."""
    if os.getpid() not in _told:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    # What is put away on the way out is not interrupted.
    signal.signal(number, signal.SIG_IGN)
    raise ToldToStop("before the first step")


@contextlib.contextmanager
def stoppable_start(alone: bool) -> Iterator[None]:
    """SIGTERM raises ToldToStop from here on, where nobody else hears or ignores it.

    alone: not one process of several, between which JAX hears it once they have joined, with a
        handler of C++ that stays.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    _told[:] = [os.getpid()]
    signal.signal(signal.SIGTERM, told_to_stop)
    stays = not alone
    try:
        yield
    except ToldToStop as stop:
        print(f"told to stop {stop}", file=sys.stderr)
        raise
    except BaseException:
        # Most of them came before the processes had joined.
        stays = False
        raise
    finally:
        if not stays:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
