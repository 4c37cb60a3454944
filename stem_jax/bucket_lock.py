"""A lock on a folder in a bucket: an object that one run writes if there is none, and renews.

Stores have no locks that end with a process. So the object tells when its run was last alive, by
the clock of the store, whatever those of the hosts show: it is written anew every half minute, and
void two minutes after.
"""

import json
import os
import sys
import threading
import time
import uuid
from typing import Any

from stem_jax.bucket import Found, put_if_absent, read_object, remove_object, replace_if
from stem_jax.errors import InputError
from stem_jax.lock import Holder, facts_of_process, runs_here
from stem_jax.storage import Place

RENEW_SECONDS = 30
VOID_SECONDS = 120
_POLL_SECONDS = 2.0


class BucketLock:
    """A lock that this process holds. `release` it, or use it as a context."""

    def __init__(self, path: Place, facts: dict[str, Any]):
        """Args:
        path: of the object. facts: what it says, which nobody else writes.
        """
        self.path = path
        self._facts = facts
        self._pid = os.getpid()
        self._released = threading.Event()
        self._lost: str | None = None
        threading.Thread(target=self._renew, name="lock-renew", daemon=True).start()

    @classmethod
    def take(cls, path: Place) -> "BucketLock | None":
        """The lock for this process; None where another run has it.

        One that may be dead is waited for until it renews the object, or it is void.

        Raises:
            InputError: see `bucket_errors`.
        """
        facts = facts_of_process() | {"token": uuid.uuid4().hex, "taken": time.time()}
        first: str | None = None
        said = False
        while True:
            if put_if_absent(path, _text(facts)):
                return cls(path, facts)
            found = read_object(path)
            if found is None:
                continue
            first = first or found.version
            alive = runs_here(_facts(found))
            if alive or found.version != first:
                return None
            if alive is False or found.age >= VOID_SECONDS:
                if replace_if(path, _text(facts), found.version):
                    return cls(path, facts)
                continue
            if not said:
                print(
                    f"waiting for the lock {path}, last written {found.age:.0f} s ago: it is void "
                    f"after {VOID_SECONDS} s",
                    file=sys.stderr,
                    flush=True,
                )
                said = True
            time.sleep(_POLL_SECONDS)

    @staticmethod
    def holder(path: Place) -> str:
        """Who holds it, for messages."""
        found = read_object(path)
        facts = {} if found is None else _facts(found)
        if "pid" not in facts:
            return "another process"
        return f"process {facts['pid']} on host {facts['host']}"

    def lost_to(self) -> str | None:
        """Who took it from this process; None while nobody did.

        That needs a process that could not renew it for two minutes.
        """
        if self._lost is None:
            found = read_object(self.path)
            if found is None:
                # Somebody removed it, or the folder. Nobody else is there.
                put_if_absent(self.path, _text(self._facts))
            elif not self._wrote(found):
                self._lost = self.holder(self.path)
        return self._lost

    def release(self) -> None:
        """Gives the lock back; a second time it does nothing."""
        if self._released.is_set() or os.getpid() != self._pid:
            return
        self._released.set()
        try:
            found = read_object(self.path)
            if found is not None and self._wrote(found):
                remove_object(self.path)
        except InputError:
            # It will be void soon; what went wrong with the bucket is said by who wrote there.
            return

    def __enter__(self) -> "BucketLock":
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def _renew(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            try:
                found = read_object(self.path)
                if found is not None and self._wrote(found):
                    # With a count: to S3 the same content is the same version, and who waits for a
                    # sign of life would see none.
                    facts = _facts(found)
                    renewed = facts | {"renewed": facts.get("renewed", 0) + 1}
                    replace_if(self.path, _text(renewed), found.version)
            except InputError:
                # The next time may go better, and `lost_to` tells what came of it.
                continue

    def _wrote(self, found: Found) -> bool:
        return _facts(found).get("token") == self._facts["token"]


def holders(path: Place) -> list[Holder]:
    """Who has the lock, or died with it, as `lock.holders` says it of one of this machine."""
    found = read_object(path)
    facts = {} if found is None else _facts(found)
    if found is None or "pid" not in facts:
        return []
    runs = runs_here(facts)
    lives = found.age < VOID_SECONDS if runs is None else runs
    return [Holder(facts["pid"], facts["host"], facts.get("taken", 0.0), lives, runs is not None)]


def _text(facts: dict[str, Any]) -> bytes:
    return (json.dumps(facts) + "\n").encode()


def _facts(found: Found) -> dict[str, Any]:
    try:
        facts = json.loads(found.content)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}
