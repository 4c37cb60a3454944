"""Programs on CPUs have their memory from the system as suits them."""

import os
import subprocess
import sys

import pytest

from stem_jax.kept_memory import keep_freed_memory, take_large_pages

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


# More than an int counts, never written: where the heap ends stays as it is.
_END_OF_HEAP = """
import ctypes
from stem_jax.kept_memory import keep_freed_memory
assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
before = libc.sbrk(0)
libc.free(libc.malloc(3 << 30))
print(libc.sbrk(0) - before >= 3 << 30)
"""


@pytest.mark.skipif(not hasattr(os, "confstr") or sys.platform != "linux", reason="glibc's")
def test_the_heap_keeps_whatever_its_size():
    command = [sys.executable, "-c", _END_OF_HEAP]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert done.stdout == "True\n", done.stderr


_BEGUN = """
import os, sys
from stem_jax.kept_memory import take_large_pages
print("begun", os.getpid(), *sys.argv[1:], flush=True)
take_large_pages()
print(os.environ.get("GLIBC_TUNABLES"))
"""


@pytest.mark.skipif(not hasattr(os, "confstr") or sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize(
    ("more", "starts", "tunables"),
    [({}, 2, "glibc.malloc.hugetlb=1"), ({"MALLOC_ARENA_MAX": "2"}, 1, "None")],
)
def test_a_program_begins_anew_with_large_pages(more, starts, tunables):
    command = [sys.executable, "-c", _BEGUN, "--flag"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=_environment(**more)
    ) as process:
        said = process.communicate()[0]
    assert said.splitlines() == [f"begun {process.pid} --flag"] * starts + [tunables]


def test_who_has_set_something_has_chosen(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert keep_freed_memory() is False


def test_a_program_that_has_jax_goes_on():
    # It would end here.
    assert "jax" in sys.modules and take_large_pages() is None
