"""A lock is one process's while it lives, with the locks of the file system and without."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from stem_jax import lock as lock_module
from stem_jax.lock import Lock

ROOT = Path(__file__).parent.parent
_CHILD = """
import sys, time
from pathlib import Path
import fcntl

def none(*_):
    raise OSError(int(sys.argv[3]), "no locks")

if int(sys.argv[3]):
    fcntl.flock = none
from stem_jax.lock import Lock

lock = getattr(Lock, sys.argv[1])(Path(sys.argv[2]))
print("none" if lock is None else "has it", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=[0, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS], ids=lambda n: f"errno{n}")
def failing(request, monkeypatch):
    """The error of the lock call, in this process and for children; 0 where it works."""

    def none(*_):
        raise OSError(request.param, "no locks")

    if request.param:
        monkeypatch.setattr(fcntl, "flock", none)
    return request.param


@contextlib.contextmanager
def _process(verb: str, path: Path, failing: int):
    """A process that takes or joins the lock and lives on."""
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, verb, str(path), str(failing)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout.readline() == "has it\n"
            yield process
        finally:
            process.kill()


def test_one_process_at_a_time(tmp_path, failing):
    path = tmp_path / "lock"
    with Lock.take(path) as lock:
        assert Lock.take(path) is None
        assert lock.lost_to() is None
    assert list(tmp_path.iterdir()) == []
    with Lock.take(path):
        pass


def test_it_names_the_process_and_its_host(tmp_path, failing):
    path = tmp_path / "lock"
    assert Lock.holder(path) == "another process"
    with _process("take", path, failing) as other:
        host = os.uname().nodename
        assert Lock.take(path) is None
        assert Lock.holder(path) == f"process {other.pid} on host {host}"


def test_a_killed_process_holds_nothing(tmp_path, failing):
    path = tmp_path / "lock"
    with _process("take", path, failing) as other:
        assert Lock.take(path) is None
        other.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        # Its parent has not asked after it: the number is still taken.
        with Lock.take(path):
            assert len(list(path.iterdir())) == 1


def test_all_of_a_run_hold_it_to_the_last(tmp_path, failing):
    path = tmp_path / "lock"
    with _process("take", path, failing) as first, _process("join", path, failing) as second:
        first.kill()
        first.wait()
        assert Lock.take(path) is None
        assert Lock.holder(path).startswith(f"process {second.pid} on")
        second.kill()
        second.wait()
        with Lock.take(path):
            pass


def test_of_many_at_once_one_has_it(tmp_path, failing):
    path, number = tmp_path / "lock", 6
    for _ in range(10):
        barrier, taken = threading.Barrier(number), []

        def take(barrier=barrier, taken=taken):
            barrier.wait()
            taken.append(Lock.take(path))

        threads = [threading.Thread(target=take) for _ in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        [lock] = [lock for lock in taken if lock is not None]
        assert len(taken) == number
        lock.release()


def test_a_forked_child_does_not_release_it(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    with Lock.take(path) as lock:
        own = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: own + 1)
        lock.release()
        monkeypatch.undo()
        assert Lock.take(path) is None


def _rewritten(path: Path, age: float, **facts) -> None:
    """Changes what the one record says, and when it was renewed."""
    [record] = path.iterdir()
    first, *rest = record.read_text().split("\n")
    # A record of its own: the old one is locked by this process.
    text = "\n".join([json.dumps(json.loads(first) | facts), *rest])
    record.unlink()
    record.write_text(text)
    os.utime(record, (time.time() - age,) * 2)


@pytest.mark.parametrize("place", [{"host": "elsewhere"}, {"boot": "before"}, {"container": "two"}])
def test_where_a_pid_says_nothing_its_record_is_renewed_or_dead(tmp_path, monkeypatch, place):
    monkeypatch.setattr(fcntl, "flock", _no_locks)
    path = tmp_path / "lock"
    lock = Lock.take(path)
    gone = {"pid": 2**22 + 1, "locked": False} | place
    _rewritten(path, age=50, **gone)
    assert Lock.take(path) is None
    assert Lock.holder(path).startswith(f"process {2**22 + 1} on")
    _rewritten(path, age=70, **gone)
    with Lock.take(path) as other:
        # The one that was thought dead finds out.
        assert lock.lost_to() == f"process {os.getpid()} on host {os.uname().nodename}"
        assert other.lost_to() is None


def _no_locks(*_):
    raise OSError(errno.ENOLCK, "no locks")


def test_patience_ends_with_a_sign_of_life_or_the_last_second(tmp_path, monkeypatch):
    """A job that is started again on other hosts goes on; one whose folder is in use is refused."""
    monkeypatch.setattr(fcntl, "flock", _no_locks)
    monkeypatch.setattr(lock_module, "_WATCH_SECONDS", 0.05)
    path = tmp_path / "lock"
    Lock.take(path)
    _rewritten(path, age=59, host="elsewhere")
    lock = Lock.take(path, patient=True)
    lock.release()

    path = tmp_path / "other"
    Lock.take(path)
    _rewritten(path, age=30, host="elsewhere")
    [record] = path.iterdir()
    renewal = threading.Timer(0.3, os.utime, [record])
    renewal.start()
    assert Lock.take(path, patient=True) is None
    renewal.join()


def test_the_number_of_a_dead_process_may_be_anothers(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", _no_locks)
    path = tmp_path / "lock"
    Lock.take(path)
    assert Lock.take(path) is None
    _rewritten(path, age=0, since="1")
    assert Lock.take(path) is not None


def test_a_lock_that_cannot_be_asked_after_is_held(tmp_path, monkeypatch):
    """Its owner elsewhere has the lock of the file system, and so does not renew the record."""
    path = tmp_path / "lock"
    Lock.take(path)
    _rewritten(path, age=3600, host="elsewhere")
    monkeypatch.setattr(fcntl, "flock", _no_locks)
    assert Lock.take(path) is None


@pytest.mark.parametrize("text", ["", '{"host": "x", "pi', "\0\0\n\0"])
def test_a_record_that_was_never_finished(tmp_path, monkeypatch, text):
    monkeypatch.setattr(lock_module, "_DECIDING_SECONDS", 0.1)
    path = tmp_path / "lock"
    path.mkdir()
    record = path / f"{time.time_ns() + 10**12:020d}-1-a"
    record.write_text(text)
    assert Lock.take(path) is None
    assert Lock.holder(path) == "another process"
    os.utime(record, (time.time() - 70,) * 2)
    assert Lock.take(path) is not None


def test_a_record_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", _no_locks)
    monkeypatch.setattr(lock_module, "RENEW_SECONDS", 0.02)
    path = tmp_path / "lock"
    with Lock.take(path):
        [record] = path.iterdir()
        os.utime(record, (0, 0))
        until = time.monotonic() + 20
        while record.stat().st_mtime < 1 and time.monotonic() < until:
            time.sleep(0.02)
        assert record.stat().st_mtime > time.time() - 30


def test_it_does_not_make_the_folder_above(tmp_path):
    with pytest.raises(FileNotFoundError):
        Lock.take(tmp_path / "no" / "lock")
