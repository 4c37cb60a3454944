"""How a process leaves the others."""

import contextlib
import time

import pytest

from tests.children import child, finish, free_port

MEETING = """
import sys
from stem_jax.processes.cluster import Gang, membership
with membership(Gang(sys.argv[1], 2, int(sys.argv[2])), "start all again"):
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather
    process_allgather(np.ones(1))
    print("together", flush=True)
    while True:
        process_allgather(np.ones(1))
"""


@pytest.mark.long
@pytest.mark.parametrize("lost", [0, 1])
def test_who_loses_another_says_so_in_a_line_and_ends(lost):
    """The coordinator or another: before JAX aborts it, and not after the heartbeat's minutes."""
    address = f"localhost:{free_port()}"
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(child("-c", MEETING, address, str(i))) for i in (0, 1)]
        for process in both:
            while process.stdout.readline() != "together\n":
                assert process.poll() is None
        both[lost].kill()
        began = time.monotonic()
        out = finish(both[1 - lost], code=70)
    assert time.monotonic() - began < 60
    assert f"error: process {1 - lost} lost another one (" in out and "start all again" in out
    assert "Traceback" not in out and "stack trace" not in out
