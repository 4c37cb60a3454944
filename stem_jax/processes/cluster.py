"""The processes of a run: how one joins the others, and how it leaves them.

JAX is imported where a process joins, as flags are parsed before.
"""

import argparse
import contextlib
import dataclasses
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator

from stem_jax.errors import InputError, TrainingError

# How long a process that fails waits for others that fail for the same reason.
_LEAVE_SECONDS = 10
# The others exit within this; then process 0 may, which serves their connections.
_LAST_SECONDS = 2
# When waiting for others is worth a word.
_NOTE_SECONDS = 15
# sysexits.h: a failure that is not the command's, and one that may pass. Launchers try again.
EXIT_FAILED = 70
EXIT_NOT_JOINED = 75
# What the others hear of a process that ended or stands still: from collectives on CPUs, from JAX's
# service, and from Orbax.
_LOST = re.compile(
    r"Gloo \S+ failed|Connection (?:reset|closed) by peer|Socket closed|heartbeat|"
    r"Timed out (?:after|while waiting)"
)
_ROUTES = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


@dataclasses.dataclass(frozen=True)
class Gang:
    """Where to find the other processes; what is None is detected (TPU VM, Slurm, Kubernetes...).

    coordinator: HOST:PORT of process 0. timeout: seconds to wait for all others.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_index: int | None = None
    timeout: int = 600

    @classmethod
    def from_environment(cls) -> "Gang":
        """What JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say."""
        address, count, index = (os.environ.get(name) or None for name in _ROUTES)
        try:
            number, place = (None if text is None else int(text) for text in (count, index))
            return cls(address, number, place)
        except ValueError:
            raise InputError(
                f"{_ROUTES[1]}={count!r} and {_ROUTES[2]}={index!r} must be whole numbers"
            ) from None

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> "Gang | None":
        """What the flags of `add_flags` say; None for a run of one process.

        Raises:
            InputError: an address without --multihost, or a timeout that is none.
        """
        if args.init_timeout <= 0:
            raise InputError(f"--init-timeout={args.init_timeout} must be above 0 seconds")
        if not args.multihost:
            given = (args.coordinator, args.num_processes, args.process_index)
            known = cls.from_environment()
            if given != (known.coordinator, known.num_processes, known.process_index):
                raise InputError(
                    "--coordinator, --num-processes and --process-index need --multihost; without "
                    "it every process would do all of the work by itself"
                )
            return None
        return cls(args.coordinator, args.num_processes, args.process_index, args.init_timeout)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --multihost, and where the other processes are."""
    known = Gang.from_environment()
    parser.add_argument(
        "--multihost", action="store_true", help="this is one of several processes of a run"
    )
    parser.add_argument(
        "--coordinator",
        default=known.coordinator,
        help="HOST:PORT of process 0, where no cluster is detected (TPU VM, Slurm, Kubernetes)",
    )
    parser.add_argument(
        "--num-processes", type=int, default=known.num_processes, help="of the run, where needed"
    )
    parser.add_argument(
        "--process-index", type=int, default=known.process_index, help="of this one, from 0"
    )
    parser.add_argument(
        "--init-timeout", type=int, default=known.timeout, help="seconds to wait for the others"
    )


def add_stop_flag(parser: argparse.ArgumentParser) -> None:
    """Adds what a launcher is told by a program that can be stopped and continued."""
    parser.add_argument(
        "--stopped-status",
        type=int,
        default=0,
        help="exit status if told to stop before the end; not 0 where 0 ends a job for good",
    )


def join(gang: Gang) -> None:
    """Makes this process one of the gang. Call it before JAX touches a device.

    Raises:
        InputError: an incomplete address, or no cluster that can be detected.
        SystemExit: the others, or process 0, were not there within the timeout; exits with
            EXIT_NOT_JOINED.
    """
    explicit = (gang.coordinator, gang.num_processes, gang.process_index)
    if gang.coordinator is not None:
        port = gang.coordinator.rpartition(":")[2]
        if not port.isdigit() or not 0 < int(port) < 2**16:
            raise InputError(f"--coordinator={gang.coordinator} has no port; give HOST:PORT")
        if gang.num_processes is None or gang.process_index is None:
            raise InputError(
                f"--coordinator={gang.coordinator} needs --num-processes=N and --process-index=I"
            )
    if gang.num_processes is not None and not 0 <= (gang.process_index or 0) < gang.num_processes:
        raise InputError(
            f"--process-index={gang.process_index} must lie in [0, {gang.num_processes}), the "
            "processes of --num-processes"
        )
    # Past its own timeout JAX aborts the process with a stack of C++; this one says why before.
    import jax

    watch = threading.Timer(gang.timeout, _not_joined, [gang])
    note = threading.Timer(_NOTE_SECONDS, _still_waiting, [gang])
    for timer in (watch, note):
        timer.daemon = True
        timer.start()
    try:
        jax.distributed.initialize(
            *explicit,
            cluster_detection_method="deactivate" if None not in explicit else None,
            initialization_timeout=gang.timeout + 60,
        )
    except ValueError as error:
        raise InputError(
            f"no cluster was detected ({error}); give --coordinator=HOST:PORT --num-processes=N "
            "--process-index=I, or leave out --multihost for a run of one process"
        ) from error
    finally:
        watch.cancel()
        note.cancel()


def _still_waiting(gang: Gang) -> None:
    where = gang.coordinator or "the coordinator (process 0)"
    print(f"waiting for the other processes at {where}, up to {gang.timeout} s", file=sys.stderr)


def _not_joined(gang: Gang) -> None:
    where = gang.coordinator or "the coordinator (process 0)"
    who = "this process" if gang.process_index is None else f"process {gang.process_index}"
    count = "" if gang.num_processes is None else f"all {gang.num_processes} "
    print(
        f"error: {who} on {socket.gethostname()} waited {gang.timeout} s at {where} without "
        f"success; start {count}processes, check that the address is that of process 0's host and "
        "that its port is open between the hosts, or raise --init-timeout",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_NOT_JOINED)


@contextlib.contextmanager
def membership(
    gang: Gang | None, again: str = "the last checkpoint stands, and the same command continues"
) -> Iterator[None]:
    """Joins the gang, and on an error leaves it without waiting long for the others.

    again: what a user can do after a failure that is not the command's.

    A process that failed would otherwise wait minutes, on its way out, for others that hang in a
    collective. If all fail for one reason they meet, so that none vanishes before another has said
    its word; if one fails alone, the others learn it from their launcher, or by the heartbeat that
    is missed. One that lost another does not wait at all: as soon as the coordinator is gone JAX
    aborts it, with a stack of C++, and its client cannot call anything of Python's instead.
    """
    if gang is None:
        yield
        return
    join(gang)
    try:
        yield
    except Exception as error:
        import jax

        index, refused = jax.process_index(), isinstance(error, InputError | TrainingError)
        lost = not refused and _LOST.search(str(error)) is not None
        if refused:
            print(f"error: process {index}: {error}", file=sys.stderr)
        elif lost:
            said = " ".join(str(error).split())[:200]
            print(f"error: process {index} lost another one ({said}); {again}", file=sys.stderr)
        else:
            traceback.print_exc()
            print(
                f"error: process {index} failed, or lost another one; {again}",
                file=sys.stderr,
            )
        with contextlib.suppress(Exception):
            if not lost:
                wait_for_all("leave", _LEAVE_SECONDS)
            if index == 0:
                time.sleep(_LAST_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if refused else EXIT_FAILED)


def wait_for_all(name: str, seconds: int) -> None:
    """Returns when every process asked for the same name; raises after so many seconds."""
    from orbax.checkpoint import multihost as orbax_multihost

    # Not a collective of the devices: on CPUs those give up after half a minute.
    wait = orbax_multihost.get_barrier_sync_fn()
    wait(key=f"stem_jax_{name}", timeout_ms=seconds * 1000)
