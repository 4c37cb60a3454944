"""Freed memory stays with a training, so that its steps need not take it again."""

import os
import subprocess
import sys

import pytest

from stem_jax.kept_memory import keep_freed_memory

# Blocks as large as a step's buffers, written and freed by another thread than the first.
_FAULTS = """
import resource, sys, threading
import numpy as np
from stem_jax.kept_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()

def turns(count):
    for _ in range(count):
        np.full(2**25, 1.0, np.float32)

def measured():
    turns(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    turns(5)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=measured)
thread.start()
thread.join()
"""


def _environment(**more):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    return {**kept, **more}


def _run(how, **more):
    command = [sys.executable, "-c", _FAULTS, how]
    return subprocess.run(command, capture_output=True, text=True, env=_environment(**more))


@pytest.mark.skipif(not hasattr(os, "confstr") or sys.platform != "linux", reason="glibc's")
def test_pages_are_not_taken_again():
    # Some systems give pages of 2 MiB: 128 MiB are 64 of these, and 32,768 of the usual ones.
    given_back, kept = _run("leave"), _run("keep")
    assert int(given_back.stdout) >= 5 * 64, given_back.stderr
    assert int(kept.stdout) < 64, kept.stderr


def test_who_has_set_something_has_chosen(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert keep_freed_memory() is False
