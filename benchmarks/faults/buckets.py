"""Faults of object storage: a store that fails, drops connections, or is away while a run uses it.

The run's folder is in a bucket of a server on this machine, behind a proxy that does it.
"""

import contextlib
import random
import time
from collections.abc import Callable

from benchmarks.faults.plan import Round
from benchmarks.faults.run import Run
from benchmarks.faults.starts import kill, terminate, victims
from tests.buckets import Answer, Proxy

# Requests in a row that fail; the clients make six attempts of each.
_FEWEST, _MOST = 4, 60
_SHORT_SECONDS, _LONG_SECONDS, _PATIENCE_SECONDS = 30.0, 240.0, 900.0
# In which a save of the campaign's model is on its way to the bucket.
_SAVE_SECONDS = 2.0
_UNAVAILABLE, _RESET = 503, 0


def fail_at_times(run: Run, at: Round, rng: random.Random) -> int | None:
    """Some requests get 503, whatever they are for."""
    return _answered(run, Answer(_UNAVAILABLE, times=rng.randrange(_FEWEST, _MOST)))


def reset_connections(run: Run, at: Round, rng: random.Random) -> int | None:
    """Some requests are lost with their connections."""
    return _answered(run, Answer(_RESET, times=rng.randrange(_FEWEST, _MOST)))


def fail_at_start(run: Run, at: Round, rng: random.Random) -> int | None:
    """Some requests of a start that goes on from a checkpoint get 503."""
    return _started(run, at, rng, Answer(_UNAVAILABLE, times=rng.randrange(_FEWEST, _MOST)))


def reset_at_start(run: Run, at: Round, rng: random.Random) -> int | None:
    """Some requests of a start are lost with their connections."""
    return _started(run, at, rng, Answer(_RESET, times=rng.randrange(_FEWEST, _MOST)))


def away(run: Run, at: Round, rng: random.Random) -> int | None:
    """All requests get 503 until the run gives up, or for minutes."""
    return _answered(run, Answer(_UNAVAILABLE), _LONG_SECONDS)


def kill_in_save(run: Run, at: Round, rng: random.Random) -> int:
    """One process, the coordinator, or all, while objects of a checkpoint are on their way."""
    chosen = victims(run, rng)
    run.wait_until(run.unfinished_saves, "a save")
    time.sleep(at.moment * _SAVE_SECONDS)
    kill(chosen)
    return run.wait()


def _started(run: Run, at: Round, rng: random.Random, answer: Answer) -> int | None:
    terminate(run, at, rng)
    known = run.starts()
    _proxy(run).answers = [answer]
    run.start()
    # One that is refused ends before.
    with contextlib.suppress(RuntimeError):
        run.wait_until(lambda: run.starts() > known, "its start")
    return _answered(run, answer)


def _answered(run: Run, answer: Answer, seconds: float = _SHORT_SECONDS) -> int | None:
    """Lets it stand until it is used up, the run has ended, or so many seconds are over."""
    proxy, reached = _proxy(run), run.last_step()
    proxy.answers = [answer]
    _wait(lambda: answer.times == 0 or run.ended is not None, seconds)
    proxy.answers = []
    # A save that failed is noticed by the one after it.
    seen = reached + 2 * run.every + 1
    _wait(lambda: run.ended is not None or run.last_step() >= seen, _PATIENCE_SECONDS)
    return run.ended


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.1)


def _proxy(run: Run) -> Proxy:
    assert run.bucket is not None
    return run.bucket.proxy
