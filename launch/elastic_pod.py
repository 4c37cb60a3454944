"""Keeps a run going on those slices of a pod that answer: for tpu_pod.sh train --elastic.

    python launch/elastic_pod.py SLICES TYPE TOPOLOGY RETRIES POLL [flags of tpu_pod.sh] -- \
        --config=... --workdir=... [as train]

Each slice is a host of elastic.py's, and a queued resource of its own. What is done on them
tpu_pod.sh does, called with --only=NUMBERS: it starts a run on these slices and follows it, tells
whether one is ready, and makes lost machines again, RETRIES times at most.
"""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

from launch import elastic
from stem_jax.config import Config
from stem_jax.elastic_mesh import largest
from stem_jax.errors import InputError
from stem_jax.storage import is_remote

SCRIPT = Path(__file__).with_name("tpu_pod.sh")
# Exit status of `mend` when it asked for machines.
MADE_AGAIN = 3
# What the number in an accelerator type counts, in devices of JAX: chips, or cores of which v4 and
# v5p have two in a chip, which is one device.
# https://docs.cloud.google.com/tpu/docs/supported-tpu-configurations
DEVICES = {"v2": 1, "v3": 1, "v4": 0.5, "v5litepod": 1, "v5p": 0.5, "v6e": 1}


def slice_devices(kind: str, topology: str) -> int:
    """Devices of a slice, of its --type and its --topology, which may be "".

    Raises:
        InputError: they say nothing of it.
    """
    if topology:
        sizes = topology.split("x")
        if all(size.isdecimal() for size in sizes):
            return math.prod(map(int, sizes))
    else:
        family, _, number = kind.rpartition("-")
        if family in DEVICES and number.isdecimal():
            return int(int(number) * DEVICES[family])
    raise InputError(
        f"--type={kind} --topology={topology} does not say how many devices a slice has, which "
        "--elastic must know; give --type=v5litepod-16, or --type=v4 --topology=2x2x2"
    )


class Script:
    """tpu_pod.sh with the flags that it was given."""

    def __init__(self, pod_flags: list[str], training: list[str]):
        self._pod_flags, self._training = pod_flags, training

    def start(
        self, command: str, slices: list[int], *more: str, retries: int = 0, **options
    ) -> subprocess.Popen:
        """Begins a command on these slices. A signal of the terminal is not for it."""
        only = f"--only={','.join(map(str, slices))}"
        argv = [str(SCRIPT), command, *self._pod_flags, only, f"--retries={retries}", "--"]
        argv += [*self._training, *more]
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True, **options)

    def ask(self, command: str, slices: list[int]) -> tuple[int, str]:
        """Exit status and output of a command, which says nothing else."""
        with self.start(
            command, slices, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            said, _ = process.communicate()
        return process.returncode, said


class SliceGang:
    """One start on some slices.

    Attributes:
        failure: exit status of the command that follows it; None if it has not failed.
    """

    def __init__(self, script: Script, slices: list[int], data: int):
        self.failure: int | None = None
        self._script, self._slices, self._signalled = script, slices, False
        self._run = script.start("train", slices, f"--config.mesh.data={data}")

    def signal(self) -> None:
        """Tells the run to save and end."""
        self._signalled = True
        self._script.start("stop", self._slices)

    def running(self, grace: float) -> bool:
        """Whether it goes on; the script itself ends workers that wait for one that failed."""
        code = self._run.poll()
        if code not in (None, 0, elastic.STOPPED) and self.failure is None:
            self.failure = code
            elastic.say(f"the run on slices {', '.join(map(str, self._slices))} ended with {code}")
        return code is None

    def over(self) -> bool:
        """Whether it is complete, or was stopped by somebody else."""
        return self._run.returncode == 0 or not self._signalled


class Slices:
    """The slices of a pod."""

    def __init__(self, count: int, retries: int, script: Script):
        self._count, self._retries, self._script = count, retries, script
        self._mending: dict[int, subprocess.Popen] = {}

    def start(self, members: list[int], data: int) -> elastic.Gang:
        """Starts the run on these."""
        return SliceGang(self._script, members, data)

    def answering(self, members: list[int]) -> list[int]:
        """Those that a run can be started on; the others are mended meanwhile, one by one."""
        found = list(members)
        for number in range(self._count):
            if number in members or not self._is_mended(number):
                continue
            code, _ = self._script.ask("answering", [number])
            if code == 0:
                found.append(number)
            else:
                mend = self._script.start("mend", [number], retries=self._retries)
                self._mending[number] = mend
        return sorted(found)

    def _is_mended(self, number: int) -> bool:
        mending = self._mending.get(number)
        if mending is not None:
            if mending.poll() is None:
                return False
            del self._mending[number]
            if mending.returncode == MADE_AGAIN:
                self._retries -= 1
        return True

    def end(self) -> None:
        """Leaves what is not mended as it is."""
        for process in self._mending.values():
            process.send_signal(signal.SIGTERM)
            process.wait()


def check_slices(config: Config, devices: int) -> None:
    """Refuses a mesh whose other axes than data are larger than a slice."""
    mesh = config.mesh
    inside = mesh.fsdp * mesh.context * mesh.tensor
    largest(config, 1, devices)
    if devices % inside:
        raise InputError(
            f"mesh.fsdp={mesh.fsdp} mesh.context={mesh.context} mesh.tensor={mesh.tensor} do not "
            f"divide over the {devices} devices of a slice, and only mesh.data may span slices"
        )


def show(config: Config, script: Script, count: int, devices: int) -> None:
    """Prints what a run is begun with while all slices answer, in a dry run."""
    number, data = largest(config, count, devices)
    asked = [script.start("answering", [index]) for index in range(count)]
    codes = [process.wait() for process in asked]
    codes.append(script.start("train", [*range(number)], f"--config.mesh.data={data}").wait())
    if any(codes):
        sys.exit(max(codes))


def main(argv: list[str]) -> None:
    """Runs to the end; see above."""
    count, kind, topology, retries, poll, *rest = argv
    at = rest.index("--")
    pod_flags, training = rest[:at], rest[at + 1 :]
    config, workdir = elastic.read_flags(training)
    devices = slice_devices(kind, topology)
    check_slices(config, devices)
    script = Script(pod_flags, training)
    if "--dry-run" in pod_flags:
        elastic.say("if all slices answer; lost ones are made again, and taken back at a save")
        show(config, script, int(count), devices)
        return
    slices = Slices(int(count), int(retries), script)

    def last_save() -> int:
        if is_remote(workdir):
            return elastic.last_save(workdir)
        # A folder that the workers share, and this machine may not have.
        for number in range(int(count)):
            code, said = script.ask("saves", [number])
            if code == 0 and said.strip().isdecimal():
                return int(said)
        return 0

    pause = float(os.environ.get("POLL_SECONDS", poll))
    try:
        elastic.run_to_end(elastic.Elastic(config, slices, devices, last_save, pause, look=pause))
    finally:
        slices.end()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as refusal:
        elastic.say(f"error: {refusal}")
        sys.exit(1)
