"""Faults of hosts: one that stands still, is slow, has another clock, or is not reached."""

import contextlib
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import libfaketime

from benchmarks.faults.plan import Round
from benchmarks.faults.run import Run
from benchmarks.faults.starts import kill, terminate

_SLOW_SECONDS = 5.0
# A short partition is waited out; past half a minute collectives give up.
_PARTITION_SECONDS = 2.0, 45.0
_STEPS = 3
_HOUR = 3600


def suspend(run: Run, at: Round, rng: random.Random) -> int:
    """A process stands still for ever."""
    run.process(rng.randrange(run.shape.processes)).suspend()
    return run.wait()


def slow(run: Run, at: Round, rng: random.Random) -> None:
    """A process gets a small part of the time, and the run goes on."""
    process = run.process(rng.randrange(run.shape.processes))
    until = time.monotonic() + _SLOW_SECONDS
    while time.monotonic() < until:
        process.suspend()
        time.sleep(rng.uniform(0.1, 1.0))
        process.resume()
        time.sleep(rng.uniform(0.02, 0.2))
    return None


def other_clock(run: Run, at: Round, rng: random.Random) -> int:
    """A process begins an hour off, jumps by two, and is then killed or told to stop."""
    terminate(run, at, rng)
    index, hours = rng.randrange(run.shape.processes), rng.choice((-1, 1))
    file = run.workdir.parent / "clock"
    file.write_text(f"{hours * _HOUR:+d}\n")
    known, reached = run.starts(), run.last_step()
    run.start(FAULT_CLOCK=f"{index}:{_library()}:{file}")
    if not _gets_to(run, known, reached + _STEPS):
        return run.wait()
    file.write_text(f"{-hours * _HOUR:+d}\n")
    # The library looks into the file once a second.
    time.sleep(1.5)
    if not _gets_to(run, known, run.last_step() + _STEPS):
        return run.wait()
    if at.moment < 0.5:
        return terminate(run, at, rng)
    kill([run.process(index)])
    return run.wait()


def partition(run: Run, at: Round, rng: random.Random) -> int:
    """Each process has a network of its own; the coordinator's is cut off for a while."""
    terminate(run, at, rng)
    known, reached = run.starts(), run.last_step()
    shortest, longest = _PARTITION_SECONDS
    with _networks(run.shape.processes) as address:
        run.start(FAULT_NETWORK=f"{_PREFIX}:{address}")
        if _gets_to(run, known, reached + _STEPS):
            _ip(f"link set {_PREFIX}v0 down")
            time.sleep(shortest + at.moment * (longest - shortest))
            _ip(f"link set {_PREFIX}v0 up")
            if _gets_to(run, known, run.last_step() + 2 * _STEPS):
                run.process(0).terminate()
        return run.wait()


def _gets_to(run: Run, known: int, step: int) -> bool:
    """Whether a start after so many that are known makes a step; False if it ends before."""
    try:
        run.wait_until(lambda: run.starts() > known, "its start")
        run.wait_for(step)
    except RuntimeError:
        return False
    return True


_PREFIX, _NETWORK = "stemfault", "10.231.77"


@contextlib.contextmanager
def _networks(count: int) -> Iterator[str]:
    """A namespace for each process behind one bridge; gives the address of the coordinator."""
    _remove_networks(count)
    try:
        _ip(f"link add {_PREFIX}b type bridge")
        _ip(f"link set {_PREFIX}b up")
        for index in range(count):
            name, address = f"{_PREFIX}.{index}", f"{_NETWORK}.{index + 1}"
            _ip(f"netns add {name}")
            _ip(f"link add {_PREFIX}v{index} type veth peer name inside netns {name}")
            _ip(f"link set {_PREFIX}v{index} master {_PREFIX}b up")
            _ip(f"-n {name} addr add {address}/24 dev inside")
            _ip(f"-n {name} link set inside up")
            _ip(f"-n {name} link set lo up")
            # Collectives meet at what the name of the host stands for; `ip netns exec` shows this.
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True)
            hosts = f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n"
            (folder / "hosts").write_text(hosts)
        yield f"{_NETWORK}.1"
    finally:
        _remove_networks(count)


def _remove_networks(count: int) -> None:
    _ip(f"link del {_PREFIX}b", check=False)
    for index in range(count):
        _ip(f"link del {_PREFIX}v{index}", check=False)
        _ip(f"netns del {_PREFIX}.{index}", check=False)
        folder = Path("/etc/netns") / f"{_PREFIX}.{index}"
        (folder / "hosts").unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()


def _ip(command: str, check: bool = True) -> None:
    subprocess.run(["ip", *command.split()], check=check, capture_output=not check)


def _library() -> Path:
    return next(Path(libfaketime.__file__).parent.rglob("libfaketime.so.1"))
