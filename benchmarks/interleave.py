"""Timing on noisy machines: contestants take turns, and ratios are taken within a round."""

import statistics
import time
from collections.abc import Callable, Mapping


def interleave(
    contestants: Mapping[str, Callable[[], None]],
    rounds: int,
    work: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call, one of each contestant per round; a first, unmeasured round warms up.

    A contestant returns when its work is done, not when it is dispatched.

    Args:
        work: gets the seconds of CPU time of each call, of all threads of this process.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    work = {} if work is None else work
    work |= {name: [] for name in contestants}
    for measured in [False] + [True] * rounds:
        for name, call in contestants.items():
            start, worked = time.perf_counter(), time.process_time()
            call()
            if measured:
                seconds[name].append(time.perf_counter() - start)
                work[name].append(time.process_time() - worked)
    return seconds


def speed_ratio(seconds: dict[str, list[float]], fast: str, slow: str) -> float:
    """How many times as fast `fast` is as `slow`: the median over rounds of the ratio."""
    return statistics.median(_ratios(seconds, fast, slow))


def ratio_range(seconds: dict[str, list[float]], fast: str, slow: str) -> tuple[float, float]:
    """Between which ratios, by the 5th and the 95th percentile, 90% of the rounds lie."""
    ratios = _ratios(seconds, fast, slow)
    if len(ratios) == 1:
        return ratios[0], ratios[0]
    twentieths = statistics.quantiles(ratios, n=20, method="inclusive")
    return twentieths[0], twentieths[-1]


def _ratios(seconds: dict[str, list[float]], fast: str, slow: str) -> list[float]:
    return [b / a for a, b in zip(seconds[fast], seconds[slow], strict=True)]
