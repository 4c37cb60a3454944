"""Batches divided over the processes; all of them have all results.

Batches are formed before they are divided, by every process in the same way. So a result is the
same, bit for bit, for any number of processes of the same machines.
"""

import hashlib
import itertools
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import jax

from stem_jax.processes.agreement import AgreedError, exchange

Batch = TypeVar("Batch")
Result = TypeVar("Result")
# What one process may wait for the share of another: that of a slower machine, or a compilation.
PATIENCE_SECONDS = 24 * 3600


def divide(
    batches: Sequence[Batch],
    work: Callable[[Sequence[Batch]], Iterable[Result]],
    on_done: Callable[[Sequence[Batch]], object] | None = None,
) -> list[Result]:
    """The result of each batch; number i is worked on by process i modulo the number of them.

    Args:
        batches: the same in every process.
        work: yields the results of the batches that it is given, in their order.
        on_done: called with batches that are done, as far as this process can tell: its own, and
            those that the others were given beside them.

    Raises:
        InputError: what was refused in any process; or processes that have other batches.
    """
    index, count = jax.process_index(), jax.process_count()
    own: list[Result] = []
    if count > 1:
        _check_same(batches)

    def make() -> bytes:
        for number, result in enumerate(work(batches[index::count])):
            own.append(result)
            if on_done is not None:
                on_done(batches[number * count : (number + 1) * count])
        return b"" if count == 1 else pickle.dumps(own)

    parts = exchange(make, PATIENCE_SECONDS)
    if count == 1:
        return own
    rounds = itertools.zip_longest(*map(pickle.loads, parts))
    return list(itertools.islice(itertools.chain.from_iterable(rounds), len(batches)))


def _check_same(batches: Sequence[Batch]) -> None:
    """Refuses batches that processes differ in, before any is worked on."""
    digests = exchange(lambda: hashlib.sha256(repr(batches).encode()).digest(), PATIENCE_SECONDS)
    for other, digest in enumerate(digests):
        if digest != digests[0]:
            raise AgreedError(
                f"process {other} asks the model something else than process 0; give all processes "
                "the same command, texts and tasks"
            )
