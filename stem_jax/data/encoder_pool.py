"""Worker processes that tokenize pieces of the input side by side, each on one thread."""

import contextlib
import itertools
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Generator, Iterable, Iterator
from typing import Any, Self

from stem_jax.data.documents import Document
from stem_jax.data.piece_encoder import PieceEncoder, receive, send
from stem_jax.errors import InputError, TrainingError

# At each worker: the piece that it works on, and the one that comes next.
_PIECES_PER_WORKER = 2
# Started apart from the program that prepares, whose module it does not import. It ignores Ctrl-C,
# which the terminal sends to all processes: its parent ends it.
_WORKER = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = {path!r}
from stem_jax.data.piece_encoder import work
work()
"""
_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

Piece = tuple[int, list[Document]]


def encode_pieces(
    pieces: Iterable[Piece], encoder: PieceEncoder, processes: int
) -> Generator[tuple[int, bytes]]:
    """(index, content of its EncodedPiece) of each piece, as they are done.

    A single piece is not worth a process. Raises InputError as `PieceEncoder.encode` does, and
    TrainingError for a worker that is killed.
    """
    pieces = iter(pieces)
    first = list(itertools.islice(pieces, 2))
    if len(first) < 2:
        for index, piece in first:
            yield index, encoder.encode(piece).to_bytes()
        return
    with _Pool(encoder, processes) as pool:
        yield from pool.encode(itertools.chain(first, pieces))


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Pool:
    """Workers with a thread each that feeds it. Leaving the context ends them."""

    def __init__(self, encoder: PieceEncoder, processes: int):
        self._tasks: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[int, str, Any]] = queue.SimpleQueue()
        self._workers = [_start_worker() for _ in range(processes)]
        self._threads = [
            threading.Thread(target=self._feed, args=(worker, encoder), daemon=True)
            for worker in self._workers
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()
            self._tasks.put(None)
        for worker, thread in zip(self._workers, self._threads, strict=True):
            thread.join()
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                _close(pipe)

    def encode(self, pieces: Iterator[Piece]) -> Iterator[tuple[int, bytes]]:
        """Reads ahead of the workers by as much as keeps them busy."""
        limit, under_way = _PIECES_PER_WORKER * len(self._workers), 0
        for piece in pieces:
            self._tasks.put(piece)
            under_way += 1
            while under_way == limit or (under_way and not self._results.empty()):
                yield self._result()
                under_way -= 1
        for _ in range(under_way):
            yield self._result()

    def _result(self) -> tuple[int, bytes]:
        index, how, content = self._results.get()
        if how == "refused":
            raise InputError(content)
        if how == "ended":
            raise TrainingError(content)
        if how != "done":
            raise RuntimeError(content)
        return index, content

    def _feed(self, worker: subprocess.Popen, encoder: PieceEncoder) -> None:
        """One thread's life: a piece to its worker, the result back."""
        index = -1
        assert worker.stdin is not None and worker.stdout is not None
        to_worker, from_worker = worker.stdin, worker.stdout
        try:
            send(to_worker, encoder)
            while (task := self._tasks.get()) is not None:
                index = task[0]
                send(to_worker, task)
                self._results.put(receive(from_worker))
        except (EOFError, OSError):
            self._results.put((index, "ended", _end_of(worker)))
        # Whoever waits for the result would wait for ever.
        except Exception:
            self._results.put((index, "failed", traceback.format_exc()))


def _start_worker() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", _WORKER.format(path=sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **_ONE_THREAD},
    )


def _end_of(worker: subprocess.Popen) -> str:
    status = worker.wait()
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return (
        f"a process that tokenizes {how}, perhaps for want of memory: the same command goes on"
        " where this one was; give it fewer --processes"
    )


def _close(pipe: Any) -> None:
    # What was still to be sent has nobody to read it.
    with contextlib.suppress(BrokenPipeError):
        pipe.close()
