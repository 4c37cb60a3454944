"""Work on a thread, and programs that end while it is under way: at once, as they would without."""

import sys
import time

import pytest

from stem_jax import background
from tests.children import child

# Compiles for a long time, as the thread of a training may, and ends meanwhile.
PROGRAM = """
import atexit, sys, time
from stem_jax.cuda_plugin import hide_cuda_plugin
hide_cuda_plugin()
import jax, jax.numpy as jnp
from stem_jax import background, cli
from stem_jax.errors import InputError
jax.config.update("jax_enable_compilation_cache", False)
def slow(x):
    for number in range(400):
        x = jnp.tanh(x @ x) + number * jnp.sort(x, axis=0)
    return x
lowered = jax.jit(slow).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32))
def work():
    begun.append(True)
    lowered.compile()
begun = []
atexit.register(lambda: print("registered"))
def main(argv):
    background.begin(work, "slow")
    while not begun:
        time.sleep(0.01)
    time.sleep(0.2)
    print("said", flush=True)
    exec(argv[0])
sys.argv[1:] = [sys.argv[1]]
cli.run(main)
"""


@pytest.mark.parametrize(
    ("ending", "status", "stderr"),
    [
        ("pass", 0, ""),
        ("sys.exit(75)", 75, ""),
        ("sys.exit('too bad')", 1, "too bad\n"),
        ("raise InputError('no such file')", 1, "error: no such file\n"),
        ("1 / 0", 1, "ZeroDivisionError"),
    ],
)
def test_a_program_ends_while_something_compiles(ending, status, stderr):
    with child("-c", PROGRAM, ending, stderr=-1) as process:
        while (line := process.stdout.readline()) != "said\n":
            assert line
        begun = time.monotonic()
        out, err = process.stdout.read(), process.stderr.read()
        process.wait(60)
    # Compiling goes on for much longer.
    assert time.monotonic() - begun < 5
    assert (process.returncode, out) == (status, "registered\n")
    assert err == stderr or (ending == "1 / 0" and stderr in err.splitlines()[-1])


def test_results_and_errors():
    found = background.begin(lambda: 3, "three")
    assert found.result(20) == 3
    failed = background.begin(lambda: 1 / 0, "none")
    assert isinstance(failed.exception(20), ZeroDivisionError)
    left = background.begin(lambda: sys.exit(3), "left")
    assert isinstance(left.exception(20), SystemExit)
    assert not background.under_way()
