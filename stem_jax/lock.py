"""A lock on a path, held while a process lives and gone when it ends, however it ends.

The path becomes a folder with a record for each process that holds the lock. A process locks its
own record (`flock`), so whoever comes later asks the file system whether its owner lives, from any
host that sees the folder. Where the file system has no locks, the record says it: it is renewed
every ten seconds, and its process is dead after sixty without, or, on the same machine, as soon as
it is gone.

Nobody ever locks a record of another's but to ask, and no two records have one name: so a record
whose owner is dead can be removed by anybody, at any time.
"""

import dataclasses
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

RENEW_SECONDS = 10
DEAD_SECONDS = 60
# How long one who takes waits for another who takes at the same moment, and looks how often.
_DECIDING_SECONDS = 5
_POLL_SECONDS = 0.02
# And how often for one who may be dead.
_WATCH_SECONDS = 1.0

_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
_IS_LOCKED = {errno.EWOULDBLOCK, errno.EACCES}
# Follows the facts in the record of one who has the lock.
_HELD = "held"


class Lock:
    """A lock that this process holds; `release` it, or use it as a context.

    Made by `take` or `join`. It is not released by going out of scope, and a forked child holds it
    too where the file system has locks.
    """

    def __init__(self, path: Path):
        """Writes a record, which does not hold the lock yet."""
        self.path = Path(path)
        self._pid = os.getpid()
        # By time, so that of two who take at once the earlier has it.
        name = f"{time.time_ns():020d}-{self._pid}-{uuid.uuid4().hex[:8]}"
        self._record = self.path / name
        self._released = threading.Event()
        self._file = _new_file(self._record)
        try:
            locked = _try_lock(self._file, fcntl.LOCK_EX) is not None
            facts = facts_of_process()
            os.write(self._file, (json.dumps(facts | {"locked": locked}) + "\n").encode())
        except BaseException:
            self.release()
            raise
        if not locked:
            threading.Thread(target=self._renew, name="lock-renew", daemon=True).start()

    @classmethod
    def take(cls, path: Path, *, patient: bool = False) -> "Lock | None":
        """The lock for this process alone; None where another live process holds it.

        Args:
            path: its parent must exist.
            patient: where the file system has no locks, wait up to a minute for the end of a
                process of another machine that does not renew its record.

        Raises OSError where the path cannot be written.
        """
        lock = cls(path)
        try:
            give_up = time.monotonic() + _DECIDING_SECONDS
            last_renewed: dict[Path, float] = {}
            while others := lock._others():
                if patient and all(other.is_silent(last_renewed) for other in others):
                    time.sleep(_WATCH_SECONDS)
                    continue
                # All who take have written their record before they look, so of two at once one
                # sees the other; who has looked already is waited for.
                taken = any(other.held or other.path < lock._record for other in others)
                if taken or time.monotonic() > give_up:
                    lock.release()
                    return None
                time.sleep(_POLL_SECONDS)
            lock._hold()
        except BaseException:
            lock.release()
            raise
        return lock

    @classmethod
    def join(cls, path: Path) -> "Lock":
        """Holds the lock beside the process that took it, which lets all of its run in.

        Nobody can `take` it until all who took and joined are gone.
        """
        lock = cls(path)
        try:
            lock._hold()
        except BaseException:
            lock.release()
            raise
        return lock

    @staticmethod
    def holder(path: Path) -> str:
        """Who holds it, for messages: "process 123 on host x"."""
        found = [_Record(record, time.time()) for record in _records(Path(path))]
        # A dead one may not have been removed yet.
        found.sort(key=lambda record: (record.facts is None, not record.lives, not record.held))
        hidden = [record.path for record in found if record.hidden]
        if hidden and not (found[0].facts and found[0].lives):
            return f"another user, whose record {hidden[0]} is not readable here"
        if not found or found[0].facts is None:
            return "another process"
        return f"process {found[0].facts['pid']} on host {found[0].facts['host']}"

    def lost_to(self) -> str | None:
        """Who took it from this process, as `holder` says it; None while nobody did.

        That needs a process that stood still for a minute on a file system without locks, or
        somebody who deleted the folder.
        """
        if self._record.exists() or not self._others():
            return None
        return self.holder(self.path)

    def release(self) -> None:
        """Gives the lock back. In a forked child, and a second time, it does nothing."""
        if os.getpid() != self._pid or self._released.is_set():
            return
        self._released.set()
        self._record.unlink(missing_ok=True)
        # Before the folder goes: NFS keeps a deleted file there while it is open.
        os.close(self._file)
        _remove_if_empty(self.path)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def _hold(self) -> None:
        os.write(self._file, f"{_HELD}\n".encode())

    def _others(self) -> list["_Record"]:
        """Records of other live processes; those of dead ones are removed."""
        # Times are those of the file system's clock, which may not be this machine's.
        os.utime(self._file)
        now = os.fstat(self._file).st_mtime
        found = [_Record(path, now) for path in _records(self.path) if path != self._record]
        for record in found:
            if not record.lives:
                record.path.unlink(missing_ok=True)
        return [record for record in found if record.lives]

    def _renew(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            try:
                os.utime(self._record)
            except FileNotFoundError:
                return
            except OSError:
                # The next time may go better, and `held` tells what came of it.
                continue


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process that holds a lock, or died with it.

    since: when it took it, by its machine's clock, in seconds. lives: as far as can be told; here:
    this machine could ask for the process itself, not for its lock or the age of its record.
    """

    pid: int
    host: str
    since: float
    lives: bool
    here: bool


def holders(path: Path) -> list[Holder]:
    """Who holds the lock of that path, the first to take it first; nothing is changed."""
    here, found = _this_machine(), []
    for record in (_Record(record, time.time()) for record in _records(path)):
        if record.facts is None or not record.held:
            # It asks for it, or is another user's, of whom nothing is known.
            continue
        since = int(record.path.name.partition("-")[0]) / 1e9
        own = all(record.facts[name] == value for name, value in here.items())
        pid, host = record.facts["pid"], record.facts["host"]
        found.append(Holder(pid, host, since, record.lives, own))
    return found


class _Record:
    """What a record says of its process.

    facts: None while they are being written. held: it has the lock, not only asks for it.
    hidden: it is another user's, who keeps it from this one; it is taken for one that has the lock.
    lives: as far as can be told. by_age: from the time of its record alone. renewed: that time.
    """

    def __init__(self, path: Path, now: float):
        """Args:
        now: what the clock of the file system shows, in seconds.
        """
        self.path = path
        self.facts: dict[str, Any] | None = None
        self.held = self.lives = self.by_age = self.hidden = False
        self.renewed = 0.0
        try:
            with path.open("rb") as file:
                self.facts, self.held = _parsed(file.read())
                self.renewed = os.fstat(file.fileno()).st_mtime
                known = None if self.facts is None else self._asked(self.facts, file.fileno())
        except FileNotFoundError:
            # Released since it was listed.
            return
        except PermissionError:
            # Its age tells nothing: where there are locks a record is not renewed.
            self.hidden = self.held = self.lives = True
            return
        self.by_age = known is None
        self.lives = now - self.renewed < DEAD_SECONDS if known is None else known

    def is_silent(self, last_renewed: dict[Path, float]) -> bool:
        """Whether its process may be dead: not if its record changed since it was first seen."""
        return self.by_age and last_renewed.setdefault(self.path, self.renewed) == self.renewed

    def _asked(self, facts: dict[str, Any], file: int) -> bool | None:
        """Whether its process lives; None if neither a lock nor its number tells."""
        locked = facts["locked"]
        if locked:
            try:
                free = _try_lock(file, fcntl.LOCK_SH)
            except BlockingIOError:
                return True
            if free:
                return False
        if (here := runs_here(facts)) is not None:
            return here
        # One who has the lock of the file system, which there is none of here, renews no record.
        return True if locked else None


def _parsed(text: bytes) -> tuple[dict | None, bool]:
    """The facts in a record, and whether its process has the lock."""
    lines = text.decode(errors="replace").split("\n")
    try:
        # Without the end of the line it is still being written.
        facts = json.loads(lines[0]) if len(lines) > 1 else None
    except ValueError:
        # A host that crashed may leave anything.
        return None, False
    return facts, lines[1:2] == [_HELD]


def _new_file(path: Path) -> int:
    lock = path.parent
    while True:
        try:
            lock.mkdir(exist_ok=True)
        except FileExistsError as error:
            why = f"{lock} is a file, where a lock shall be: move it away"
            raise FileExistsError(error.errno, why) from error
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        except FileNotFoundError:
            # Whoever released it in this moment has removed the empty folder.
            continue
        except PermissionError as error:
            if not os.access(lock.parent, os.W_OK):
                raise
            why = f"in use by another user, or not readable: {lock}"
            raise PermissionError(error.errno, why) from error


def _try_lock(file: int, kind: int) -> bool | None:
    """Whether the file was locked; None where the file system has no locks.

    Raises BlockingIOError where another process has it.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _IS_LOCKED:
            raise BlockingIOError(error.errno, error.strerror) from error
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _records(path: Path) -> list[Path]:
    try:
        # NFS names deleted files that are still open with a dot.
        return sorted(record for record in path.iterdir() if record.name[:1].isdigit())
    except FileNotFoundError:
        return []


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise


def facts_of_process() -> dict[str, Any]:
    """What tells this process from every other one, as a record of a lock says it."""
    pid = os.getpid()
    return _this_machine() | {"pid": pid, "since": _started(pid)}


def runs_here(facts: dict[str, Any]) -> bool | None:
    """Whether the process of such facts lives; None if it is not one of this machine."""
    if any(facts.get(name) != value for name, value in _this_machine().items()):
        return None
    return _runs(facts["pid"], facts["since"])


def _this_machine() -> dict[str, str]:
    """Where a process number means something: a host, since it was started, and a container."""
    return {
        "host": socket.gethostname(),
        "boot": _text(Path("/proc/sys/kernel/random/boot_id")).strip(),
        "container": _target(Path("/proc/self/ns/pid")),
    }


def _runs(pid: int, since: str) -> bool:
    """Whether the process that started then is still there; its number may be another's by now."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # It is another user's.
        pass
    # Dead, but its parent has not asked how it ended.
    gone = _statistics(pid)[:1] in (["Z"], ["X"])
    return not gone and _started(pid) in (since, "")


def _started(pid: int) -> str:
    """When it started, in ticks since the machine did; "" where the system does not tell."""
    return (_statistics(pid) or [""] * 20)[19]


def _statistics(pid: int) -> list[str]:
    # The name before them, in parentheses, may hold anything.
    return _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""
