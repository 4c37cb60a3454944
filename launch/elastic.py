"""Keeps a run going on those of its hosts that answer: for local_multihost.sh --elastic, and with
slices for hosts (elastic_pod.py) for tpu_pod.sh --elastic.

    python launch/elastic.py HOSTS DEVICES [--probe=COMMAND] [--config=... --workdir=... as train]

Starts one process for each host that answers, from the last checkpoint, with mesh.data as large as
batch and rows divide over. When a process is lost the others are ended, and whoever answers then
goes on. When more answer, the next save that is whole is the last of this size: the run is told to
stop, which saves once more, and goes on with all of them.

COMMAND is asked of each host, by a shell with HOST=0, 1, ... in its environment: a host answers if
it exits with 0 within PROBE_SECONDS. Without one, all do: processes of this machine.
"""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

from stem_jax import cli
from stem_jax.bucket_errors import bucket_errors
from stem_jax.checkpoints.files import is_checkpoint
from stem_jax.config import Config
from stem_jax.config_file import load_config
from stem_jax.elastic_mesh import largest
from stem_jax.errors import InputError
from stem_jax.local_copy import CHECKPOINTS
from stem_jax.storage import Place

PROBE_SECONDS = 10.0
# By which a run that was told to stop is told from one that is complete.
STOPPED = 79
# The same command would be refused again.
REFUSED = (1, 2)
NO_PROGRESS = 75
# Starts in a row without a checkpoint between them.
MOST_STARTS = 5


def say(text: str) -> None:
    """On stderr, as the scripts do."""
    print(f"elastic: {text}", file=sys.stderr, flush=True)


class Gang(Protocol):
    """The processes of one start.

    Attributes:
        failure: exit status of the first that failed; None if none has.
    """

    failure: int | None

    def signal(self) -> None:
        """Tells the run to save and end."""

    def running(self, grace: float) -> bool:
        """Whether some process goes on; those that wait for one that failed end within `grace`."""

    def over(self) -> bool:
        """Whether, without a failure, the run is not to go on."""


class Hosts(Protocol):
    """What a run can be started on."""

    def answering(self, members: list[int]) -> list[int]:
        """The numbers of those that answer; on `members` the run is going on."""

    def start(self, members: list[int], data: int) -> Gang:
        """Starts the run on these, with this `mesh.data`."""


class LocalHosts:
    """This machine's processes as hosts."""

    def __init__(self, count: int, probe: str | None, devices: int, flags: list[str]):
        self._count, self._probe, self._devices, self._flags = count, probe, devices, flags

    def start(self, members: list[int], data: int) -> Gang:
        """Starts a process for each."""
        return LocalGang(members, data, self._devices, self._flags)

    def answering(self, members: list[int]) -> list[int]:
        """Their numbers; all are asked at once."""
        if self._probe is None:
            return list(range(self._count))
        asked = [
            subprocess.Popen(["bash", "-c", self._probe], env=os.environ | {"HOST": str(host)})
            for host in range(self._count)
        ]
        deadline, found = time.monotonic() + PROBE_SECONDS, []
        for host, process in enumerate(asked):
            try:
                if process.wait(max(0.0, deadline - time.monotonic())) == 0:
                    found.append(host)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return found


class LocalGang:
    """The processes of one start on this machine.

    Attributes:
        failure: exit status of the first that failed; None if none has.
    """

    def __init__(self, hosts: list[int], data: int, devices: int, flags: list[str]):
        self.failure: int | None = None
        self._failed_at = 0.0
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        # Gloo finds the others by this machine's name, whatever else the host is called.
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
            f"--xla_force_host_platform_device_count={devices}",
        }
        self._processes = {}
        for index, host in enumerate(hosts):
            argv = [sys.executable, "-m", "stem_jax.train", "--multihost"]
            argv += [f"--coordinator=localhost:{port}", f"--num-processes={len(hosts)}"]
            argv += [f"--process-index={index}", *flags, f"--config.mesh.data={data}"]
            argv += [f"--stopped-status={STOPPED}"]
            said = {} if index == 0 else {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            process = subprocess.Popen(argv, env=environment | {"HOST": str(host)}, **said)
            self._processes[host] = process
            if index:
                threading.Thread(target=_repeat, args=(host, process), daemon=True).start()

    def signal(self) -> None:
        """Tells the run to save and end."""
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()

    def running(self, grace: float) -> bool:
        """Whether some process goes on; those that wait for one that failed end within `grace`."""
        codes = {host: process.poll() for host, process in self._processes.items()}
        for host, code in codes.items():
            if code not in (None, 0, STOPPED) and self.failure is None:
                self.failure, self._failed_at = code, time.monotonic()
                say(f"the process of host {host} ended with {code}")
        alive = [process for host, process in self._processes.items() if codes[host] is None]
        if alive and self.failure is not None and time.monotonic() - self._failed_at > grace:
            say(f"ending {len(alive)} processes that wait for it")
            self.kill()
            return False
        return bool(alive)

    def kill(self) -> None:
        """Ends all at once."""
        for process in self._processes.values():
            process.kill()
            process.wait()

    def over(self) -> bool:
        """Whether the last step was made."""
        return all(process.returncode == 0 for process in self._processes.values())


def _repeat(host: int, process: subprocess.Popen) -> None:
    for line in process.stderr:
        sys.stderr.write(f"[{host}] {line.decode(errors='replace')}")


class Elastic:
    """A run from its first start to its end.

    Args:
        devices: of each host.
        last_save: the step of the newest whole checkpoint, 0 for none.
        pause: seconds between looks at hosts.
        look: seconds between looks for a save that is awaited.
    """

    def __init__(
        self,
        config: Config,
        hosts: Hosts,
        devices: int,
        last_save: Callable[[], int],
        pause: float,
        look: float,
    ):
        self._config, self._hosts, self._devices = config, hosts, devices
        self._last_save, self._pause, self._look = last_save, pause, look
        self._grace = float(os.environ.get("GRACE_SECONDS", 15))
        self._told = threading.Event()
        self._gang: Gang | None = None

    def stop(self, *_) -> None:
        """SIGTERM and SIGINT: the run saves and ends, and is not started again."""
        self._told.set()
        if self._gang is not None:
            self._gang.signal()

    def run(self) -> int:
        """The exit status: 0 where the run is complete or was told to stop."""
        starts, saved = 0, self._last_save()
        while True:
            members, data = self._wait_for_hosts()
            if self._told.is_set():
                return 0
            say(f"starting on hosts {', '.join(map(str, members))} with mesh.data={data}")
            self._gang = gang = self._hosts.start(members, data)
            if self._told.is_set():
                gang.signal()
            self._watch(gang, members)
            if gang.failure in REFUSED:
                return gang.failure
            if gang.failure is None and (gang.over() or self._told.is_set()):
                return 0
            if self._told.is_set():
                return gang.failure or NO_PROGRESS
            before, saved = saved, self._last_save()
            starts = 0 if saved > before else starts + 1
            if starts >= MOST_STARTS:
                say(f"{starts} starts without a new checkpoint; the same command continues the run")
                return NO_PROGRESS

    def _wait_for_hosts(self) -> tuple[list[int], int]:
        """Those to start on: the first that answer, as many as the run divides over."""
        waiting = False
        while not self._told.is_set():
            answering = self._hosts.answering([])
            number, data = largest(self._config, len(answering), self._devices)
            if number:
                return answering[:number], data
            if not waiting:
                say(f"hosts that answer: {len(answering)}; batch and rows divide over none of them")
            waiting = True
            self._told.wait(self._pause)
        return [], 0

    def _watch(self, gang: Gang, members: list[int]) -> None:
        """Returns when all processes have ended."""
        asked, newest, growing, told = time.monotonic(), 0, False, False
        while gang.running(self._grace):
            time.sleep(self._look if growing else 0.2)
            if told or gang.failure is not None or self._told.is_set():
                continue
            if not growing and time.monotonic() - asked > self._pause:
                answering = self._hosts.answering(members)
                asked = time.monotonic()
                if largest(self._config, len(answering), self._devices)[0] > len(members):
                    say(f"{len(answering)} hosts answer; the next save is the last of this size")
                    growing, newest = True, self._last_save()
            if growing and (self._last_save() > newest or not self._config.checkpoint.every):
                gang.signal()
                told = True


def read_flags(flags: list[str]) -> tuple[Config, Place]:
    """The configuration and the work folder that training's flags name."""
    rest, overrides = cli.split_overrides(flags)
    parser = cli.Parser("launch/elastic.py", None)
    parser.add_path("--config", required=True)
    parser.add_place("--workdir", required=True)
    # Among training's own flags.
    args, _ = parser.parse_known_args(rest)
    return load_config(args.config, overrides), args.workdir


def last_save(workdir: Place) -> int:
    """The step of the newest whole checkpoint of a run, 0 for none."""
    folder = workdir / CHECKPOINTS
    with bucket_errors(folder):
        there = list(folder.iterdir()) if folder.is_dir() else []
        return max((int(path.name) for path in there if is_checkpoint(path)), default=0)


def run_to_end(elastic: Elastic) -> None:
    """Ends this process with the run's exit status; SIGTERM and SIGINT save and end the run."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, elastic.stop)
    sys.exit(elastic.run())


def main(argv: list[str]) -> None:
    """Runs to the end; see above."""
    count, devices, *flags = argv
    probe = None
    if flags and flags[0].startswith("--probe="):
        probe = flags.pop(0).partition("=")[2]
    config, workdir = read_flags(flags)
    hosts = LocalHosts(int(count), probe, int(devices), flags)
    pause = float(os.environ.get("POLL_SECONDS", 5))
    saved = functools.partial(last_save, workdir)
    run_to_end(Elastic(config, hosts, int(devices), saved, pause, look=0.2))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as refusal:
        say(f"error: {refusal}")
        sys.exit(1)
