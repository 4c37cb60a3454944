"""What a run folder in a bucket has on this machine: everything but its checkpoints.

Objects cannot be appended to. So whatever a run appends or writes often is written into a folder of
this machine, which begins with what the bucket has, and the bucket gets whole files: those that
changed since, at every save, at the end, and every few seconds between. Checkpoints are written and
read in the bucket itself, see `checkpoints_of`.

A file `.copy.json` in the folder says whose copy it is, and which version of each object it has.
"""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from stem_jax.bucket import download, list_objects, read_object, remove_object, upload
from stem_jax.compilation_cache import cache_home
from stem_jax.errors import InputError
from stem_jax.files import write_whole
from stem_jax.storage import Place, bucket_of, is_remote, place

CHECKPOINTS = "checkpoints"
# Where copies lie; without it in the user's cache.
VARIABLE = "STEM_JAX_COPIES"
_RECORD = ".copy.json"
# What is sent in one request by either client.
_SMALL_BYTES = 4 << 20
# Not of the copy: what Orbax writes, what was moved away from there, and the lock.
_APART = (f"{CHECKPOINTS}/", "damaged_checkpoints/", ".lock")
# What a start says of itself.
_OF_A_START = ("logs/", "goodput/", "prometheus/", "tensorboard/", "tracking/", "config.json")


class LocalCopy:
    """A folder of this machine with the files of one in a bucket.

    address: of the folder in the bucket. folder: of this machine. counts: what a start says of
    itself is sent; not while it may still be refused.
    """

    def __init__(self, address: Place, folder: Path):
        """Makes the folder, empty, if there is none."""
        self.address = address
        self.folder = folder
        self.counts = True
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        record = _record(folder)
        # Of each file: the version in the bucket, and size and time here, as they last agreed.
        self._files: dict[str, list] = record.get("files", {}) if record else {}
        self._save()

    def fetch(self) -> int:
        """Brings what the bucket has and this folder has not; returns how many objects are there.

        A file that was written here since, and by nobody in the bucket, stays; one that the bucket
        had and has no more goes.

        Raises:
            InputError: other runs are below it; see `bucket_errors`, as `upload` does.
        """
        with self._lock:
            listed = list_objects(self.address)
            self._check_one_run(listed)
            found = {name: of for name, of in listed.items() if not name.startswith(_APART)}
            for name, stored in found.items():
                path = self.folder / name
                if name in self._files and self._files[name][0] == stored.version and path.exists():
                    continue
                download(self.address / name, path)
                # How old it is tells whether its run lives.
                os.utime(path, (stored.written, stored.written))
                self._files[name] = [stored.version, *_state(path)]
            for name in set(self._files) - set(found):
                # A listing may lack what was just written.
                if read_object(self.address / name) is not None:
                    continue
                (self.folder / name).unlink(missing_ok=True)
                del self._files[name]
            self._save()
            return len(listed)

    def _check_one_run(self, listed: Iterable[str]) -> None:
        """A copy of a folder of runs would bring all of their checkpoints."""
        of_runs = filter(_is_below, listed)
        below = sorted({name.partition(f"/{CHECKPOINTS}/")[0] for name in of_runs})
        if below:
            more = f" and {len(below) - 3} more" if len(below) > 3 else ""
            raise InputError(
                f"{self.address}: it has runs below it ({', '.join(below[:3])}{more}); give the "
                "folder of one, or another name"
            )

    def upload(self) -> None:
        """Writes the files that changed here to the bucket; what is gone here goes there, too."""
        with self._lock:
            if not (self.folder / _RECORD).exists():
                # Somebody removed the copy.
                self._files.clear()
            changed = []
            for path in sorted(_files(self.folder)):
                name = path.relative_to(self.folder).as_posix()
                if not self.counts and name.startswith(_OF_A_START):
                    continue
                try:
                    # Before it is read: what is appended meanwhile counts as a change.
                    state = _state(path)
                    if name in self._files and self._files[name][1:] == state:
                        continue
                    self._send(path, self.address / name, state[0])
                except FileNotFoundError:
                    # A temporary file that has its name by now.
                    continue
                self._files[name] = ["", *state]
                changed.append(name)
            for name in [name for name in self._files if not (self.folder / name).exists()]:
                remove_object(self.address / name)
                del self._files[name]
            if changed:
                # One listing tells the versions of all.
                listed = list_objects(self.address)
                for name in changed:
                    if name in listed:
                        self._files[name][0] = listed[name].version
                self._save()

    def give_up(self) -> None:
        """A start was refused: what it said of itself is said to nobody, here or by a later one."""
        with self._lock:
            for path in list(_files(self.folder)):
                name = path.relative_to(self.folder).as_posix()
                if name not in self._files and name.startswith(_OF_A_START):
                    path.unlink(missing_ok=True)
                elif name in self._files and self._files[name][1:] != _state(path):
                    # The bucket's is brought again.
                    self._files[name] = ["", *_state(path)]
            self._save()

    def _send(self, path: Path, target: Place, size: int) -> None:
        if size < _SMALL_BYTES:
            upload(path, target)
            return
        # Larger ones travel in parts; gcsfs takes one that grows meanwhile for longer than it said.
        still = self.folder / ".uploading"
        try:
            shutil.copyfile(path, still)
            upload(still, target)
        finally:
            still.unlink(missing_ok=True)

    def _save(self) -> None:
        record = {"address": str(self.address), "files": self._files}
        write_whole(self.folder / _RECORD, json.dumps(record, indent=0) + "\n")


def _is_below(name: str) -> bool:
    """Whether an object is of a checkpoint of a run in another folder."""
    return not name.startswith(_APART) and f"/{CHECKPOINTS}/" in name


@contextlib.contextmanager
def uploading(
    copy: LocalCopy, every: float | None, on_error: Callable[[InputError], None]
) -> Iterator[None]:
    """Uploads what changed every so many seconds, on a thread, and at the end in any case.

    Args:
        every: seconds; None for at the end alone. A start that is refused sends nothing.
        on_error: takes what an upload between is refused for; the next one may go better.

    Raises:
        InputError: what is refused at the end, if nothing else is under way.
    """
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(every):
            try:
                copy.upload()
            except InputError as error:
                on_error(error)

    thread = threading.Thread(target=repeat, name="upload", daemon=True)
    if every is not None:
        thread.start()
    failed, refused = True, False
    try:
        yield
        failed = False
    except InputError:
        refused = not copy.counts
        raise
    finally:
        done.set()
        if thread.is_alive():
            thread.join()
        try:
            if refused:
                copy.give_up()
            else:
                copy.counts = True
                copy.upload()
        except InputError as error:
            # The first failure is what is said.
            if not failed:
                raise
            on_error(error)


def copy_folder(address: Place, use: str) -> Path:
    """Where a copy of a folder in a bucket lies.

    use: "reading", or the process that writes; no two of them have one copy.
    """
    scheme, bucket, key = bucket_of(address)
    home = os.environ.get(VARIABLE)
    root = Path(home).expanduser() if home else cache_home() / "stem_jax" / "copies"
    return root.absolute() / use / scheme / bucket / (key or "_")


def address_of(folder: str | Path) -> Place:
    """Where a folder is that a run was given: itself, or what it is the copy of."""
    if is_remote(folder):
        return place(folder, "--workdir")
    record = _record(Path(folder))
    return Path(folder) if record is None else place(record["address"], "--workdir")


def checkpoints_of(folder: str | Path) -> Place:
    """The folder of a run's checkpoints, which a run in a bucket has there."""
    address = address_of(folder)
    return (address if is_remote(address) else address.absolute()) / CHECKPOINTS


@contextlib.contextmanager
def naming(address: Place, flag: str) -> Iterator[None]:
    """Puts the flag that named a folder of a bucket before what that is refused for."""
    try:
        yield
    except InputError as error:
        where, _, reason = str(error).partition(": ")
        if not where.startswith(str(address)):
            raise
        raise InputError(f"{flag}={address}: {reason}") from error


def _record(folder: Path) -> dict | None:
    try:
        return json.loads((folder / _RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _files(folder: Path) -> Iterator[Path]:
    """All but hidden ones, such as what is being made."""
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(where, name) for name in names if not name.startswith("."))


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
