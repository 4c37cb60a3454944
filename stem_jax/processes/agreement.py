"""How the processes of a run come to one verdict.

A process that raises alone leaves the others waiting in a collective. So whatever a process may be
refused for by itself is asked under `unanimous`, and whatever must be the same everywhere is
compared by `check_same`, both before the first step. Where each has a part of the work, `exchange`
gives all of them all parts, or the refusal.

Verdicts may be nested: wherever inside the outer one a process is refused, the others learn it at
the next verdict that they come to, and it is final for all.
"""

import contextlib
import itertools
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from stem_jax.errors import InputError
from stem_jax.processes.cluster import wait_for_all

# What a look into a folder may take, and preparing text, which one process does for all.
_PATIENCE_SECONDS = 600
PREPARING_SECONDS = 24 * 3600
# What a folder on a network may need to show a file that another host wrote.
_FOLDER_SECONDS = 15
# How long a process that failed waits for the others to hear of it.
_FAILED_SECONDS = 60
# What a process brings to a verdict begins with one of these.
_DONE, _REFUSED, _FAILED = b"+", b"-", b"!"
# Every process asks for the same verdicts in the same order.
_verdicts = itertools.count()


def is_first() -> bool:
    """Whether this process speaks and writes for all."""
    return jax.process_index() == 0


class AgreedError(InputError):
    """A refusal that every process knows of."""


class OtherFailedError(RuntimeError):
    """Another process failed, and said so before it left."""


@contextlib.contextmanager
def unanimous(patience: int = _PATIENCE_SECONDS, tell_failures: bool = False) -> Iterator[None]:
    """Every process runs the body; if it is refused in one of them, it is refused in all.

    Args:
        patience: seconds to wait for the others.
        tell_failures: let the others know of an error that is no refusal too, if they come to a
            verdict soon; else they learn it when the heartbeat is missed.

    Raises:
        InputError: its own, or the first one of another process, with that process's number.
        OtherFailedError: another process told of a failure.
    """
    error = None
    try:
        yield
    except (AgreedError, OtherFailedError):
        raise
    except InputError as own:
        error = own
    except Exception as own:
        if tell_failures and jax.process_count() > 1:
            wait_for_all(f"verdict_{next(_verdicts)}", min(patience, _FAILED_SECONDS))
            _gather(_FAILED + " ".join(f"{type(own).__name__}: {own}".split()).encode())
        raise
    _meet(error, b"", patience)


def exchange(make: Callable[[], bytes], patience: int = _PATIENCE_SECONDS) -> list[bytes]:
    """Every process makes its part, which is not empty; all get the parts of all, in their order.

    Args:
        patience: seconds to wait for the others.

    Raises:
        InputError: as `unanimous` does.
    """
    error, part = None, b""
    try:
        part = make()
    except AgreedError:
        raise
    except InputError as own:
        error = own
    return _meet(error, part, patience)


def _meet(error: InputError | None, part: bytes, patience: int) -> list[bytes]:
    """The parts of all processes, unless one of them has an error."""
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return [part]
    wait_for_all(f"verdict_{next(_verdicts)}", patience)
    said = _gather(_DONE + part if error is None else _REFUSED + str(error).encode())
    if error is not None:
        raise AgreedError(str(error)) from error
    for index, text in enumerate(said):
        if text.startswith(_FAILED):
            raise OtherFailedError(f"process {index} failed: {text[1:].decode()}")
        if text.startswith(_REFUSED):
            raise AgreedError(f"process {index}: {text[1:].decode()}")
    if len({len(text) > 1 for text in said}) > 1:
        raise AgreedError(
            "one process has more to do than another; give all of them the same command and files"
        )
    return [text[1:] for text in said]


def check_same(
    facts: dict[str, str], remedy: str = "start all processes with the same command and code"
) -> None:
    """Refuses, in every process, facts that are not the same in all of them.

    Args:
        facts: by what they are called.
        remedy: what the user is to do.

    Raises:
        InputError: names the first process that differs from process 0, the fact and both values.
    """
    everyone = [json.loads(text) for text in _gather(json.dumps(facts).encode())]
    for index, found in enumerate(everyone):
        for name in {**everyone[0], **found}:
            here, there = everyone[0].get(name), found.get(name)
            if here != there:
                raise InputError(
                    f"process {index} differs from process 0 in {name}: {_short(there)}, not "
                    f"{_short(here)}; {remedy}"
                )


def check_shared(folder: Path) -> None:
    """Refuses, in every process, a folder that is not one and the same for all of them.

    Raises:
        InputError: names a process and its host that do not see what process 0 writes there.
    """
    if jax.process_count() == 1:
        return
    token = _gather(secrets.token_hex(8).encode())[0].decode()
    mark = folder / f".seen-by-all-{token}"
    with unanimous():
        if is_first():
            mark.touch()
    first_host = _gather(socket.gethostname().encode())[0].decode()
    try:
        with unanimous():
            deadline = time.monotonic() + _FOLDER_SECONDS
            while not mark.exists():
                # Listing makes some network file systems look again.
                list(folder.iterdir())
                if time.monotonic() > deadline:
                    raise InputError(
                        f"--workdir={folder} on host {socket.gethostname()} is another folder than "
                        f"on host {first_host} of process 0; use one that all hosts mount, such "
                        "as NFS, Filestore or a bucket"
                    )
                time.sleep(0.2)
    finally:
        if is_first():
            mark.unlink(missing_ok=True)


def _gather(part: bytes) -> list[bytes]:
    """The parts of all processes, in their order."""
    if jax.process_count() == 1:
        return [part]
    lengths = multihost_utils.process_allgather(np.array([len(part)], np.int32)).reshape(-1)
    # A power of two, so that parts of many sizes take few programs.
    padded = np.zeros(1 << int(lengths.max()).bit_length(), np.uint8)
    padded[: len(part)] = np.frombuffer(part, np.uint8)
    rows = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def _short(value: str | None) -> str:
    return "nothing" if value is None else value[:80]
