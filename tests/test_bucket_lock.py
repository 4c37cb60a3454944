"""The lock of a folder in a bucket: one holder, told by the store's clock whether it lives."""

import json
import os
import threading
import time

import pytest

from stem_jax import bucket as objects
from stem_jax import bucket_lock
from stem_jax.bucket_lock import BucketLock
from stem_jax.lock import facts_of_process


@pytest.fixture
def path(bucket):
    return bucket.path / "run" / ".lock"


def _held_elsewhere(path, **facts) -> None:
    """By a process of another host."""
    record = facts_of_process() | {"host": "other", "boot": "x", "token": "t", "pid": 7} | facts
    objects.put(path, (json.dumps(record) + "\n").encode())


def test_one_has_it_until_it_gives_it_back(path):
    with BucketLock.take(path) as lock:
        assert BucketLock.take(path) is None
        assert lock.lost_to() is None
        assert BucketLock.holder(path).startswith("process ")
    assert objects.read_object(path) is None
    again = BucketLock.take(path)
    assert again is not None
    again.release()


def test_that_of_a_dead_process_of_this_machine_is_taken_at_once(path):
    objects.put(path, json.dumps(facts_of_process() | {"since": "0"}).encode())
    began = time.monotonic()
    lock = BucketLock.take(path)
    assert lock is not None and time.monotonic() - began < 5
    lock.release()


def test_one_that_renews_it_is_alive(path, monkeypatch):
    _held_elsewhere(path)
    monkeypatch.setattr(bucket_lock, "_POLL_SECONDS", 0.1)
    renewed = threading.Timer(0.3, _held_elsewhere, [path], {"renewed": 1})
    renewed.start()
    assert BucketLock.take(path) is None
    renewed.join()
    assert BucketLock.holder(path) == "process 7 on host other"


def test_a_lock_that_is_renewed_is_seen_to_be_from_another_host(path, monkeypatch):
    monkeypatch.setattr(bucket_lock, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(bucket_lock, "_POLL_SECONDS", 0.1)
    with BucketLock.take(path) as lock:
        # Nobody there can ask whether the process lives.
        monkeypatch.setattr(bucket_lock, "runs_here", lambda facts: None)
        taken: list[BucketLock | None] = []
        other = threading.Thread(target=lambda: taken.append(BucketLock.take(path)), daemon=True)
        other.start()
        other.join(timeout=60)
        assert taken == [None]
        assert lock.lost_to() is None
    assert objects.read_object(path) is None


def test_one_that_does_not_is_void_by_the_clock_of_the_store(path, monkeypatch, capsys):
    _held_elsewhere(path)
    monkeypatch.setattr(bucket_lock, "VOID_SECONDS", 2)
    monkeypatch.setattr(bucket_lock, "_POLL_SECONDS", 0.1)
    # A host whose clock is a day ahead does not take it any sooner.
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 86400)
    began = time.monotonic()
    lock = BucketLock.take(path)
    assert lock is not None and time.monotonic() - began >= 0.9
    # Whoever waits is told so, once.
    assert capsys.readouterr().err.count(f"waiting for the lock {path}, last written ") == 1
    lock.release()


def test_everybody_is_told_who_has_it(path, monkeypatch):
    assert bucket_lock.holders(path) == []
    with BucketLock.take(path):
        [own] = bucket_lock.holders(path)
        assert own.pid == os.getpid() and own.lives and own.here
        assert abs(own.since - time.time()) < 60
    _held_elsewhere(path)
    [other] = bucket_lock.holders(path)
    assert (other.pid, other.host, other.lives, other.here) == (7, "other", True, False)
    monkeypatch.setattr(bucket_lock, "VOID_SECONDS", 0)
    assert not bucket_lock.holders(path)[0].lives


def test_it_is_renewed(path, monkeypatch):
    monkeypatch.setattr(bucket_lock, "RENEW_SECONDS", 0.1)
    lock = BucketLock.take(path)
    time.sleep(1.5)
    assert objects.read_object(path).age < 1.5
    lock.release()


def test_who_could_not_renew_it_learns_who_took_it(path):
    lock = BucketLock.take(path)
    _held_elsewhere(path)
    assert lock.lost_to() == "process 7 on host other"
    lock.release()
    assert objects.read_object(path) is not None


def test_one_whose_object_was_removed_writes_it_again(path):
    lock = BucketLock.take(path)
    objects.remove_object(path)
    assert lock.lost_to() is None and objects.read_object(path) is not None
    lock.release()
