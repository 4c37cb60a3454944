"""Processes of their own for tests: with so many CPU devices, and none outlives its test."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax

from tests import effort

ROOT = Path(__file__).parent.parent
# The training command, which writes no record of step argv[1] or a later one before argv[2] exists:
# however fast the machine is, a signal comes before the end.
HELD = """
import sys, time
from pathlib import Path
from stem_jax import cli, train
from stem_jax.training.metrics import MetricsLog
step, go_on = int(sys.argv[1]), Path(sys.argv[2])
del sys.argv[1:3]
write = MetricsLog.write
def held(self, number, *args, **kwargs):
    while number >= step and not go_on.exists():
        time.sleep(0.02)
    write(self, number, *args, **kwargs)
MetricsLog.write = held
cli.run(train.main)
"""


@contextlib.contextmanager
def child(*argv: str, devices: int = 1, stderr: int = subprocess.STDOUT, **environment: str):
    """`python argv...` in the repository, with the compilation cache of all tests."""
    settings = {
        "XLA_FLAGS": effort.flags(devices),
        "PYTHONPATH": str(ROOT),
        # All of them compile the same programs.
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    process = subprocess.Popen(
        [sys.executable, *argv],
        cwd=ROOT,
        env=os.environ | settings | environment,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def pair(*argv: str, devices: int, count: int = 2):
    """Two such processes, or more, that find each other by PAIR_ADDRESS; PAIR_ID is 0, 1, ..."""
    address = f"localhost:{free_port()}"
    numbers = map(str, range(count))
    environment = {"PAIR_ADDRESS": address, "PAIR_COUNT": str(count)}
    return [child(*argv, devices=devices, PAIR_ID=n, **environment) for n in numbers]


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def gang(program: str, *commands: list[str], changes: str = "", **environment: str):
    """One process of a program such as stem_jax.train for each list of its flags.

    changes: Python code that comes first.
    """
    start = ["-m", program]
    if changes:
        run = f"from stem_jax import cli; from {program} import main; cli.run(main)"
        start = ["-c", f"{changes}\n{run}"]
    port, count = free_port(), len(commands)
    where = [f"--coordinator=localhost:{port}", f"--num-processes={count}"]
    return [
        child(*start, "--multihost", *where, f"--process-index={index}", *argv, **environment)
        for index, argv in enumerate(commands)
    ]


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """What it printed; fails if it exits with another code."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, (err or out)[-5000:]
    return out


def train_flags(config: str, workdir: Path, values: dict, overrides: dict) -> list[str]:
    """Command-line arguments of a run; keys of `overrides` are section__key."""
    values = values | {key.replace("__", "."): value for key, value in overrides.items()}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return [f"--config=configs/{config}.py", f"--workdir={workdir}", *flags]
