"""Who may write the folder of a run: one training or import at a time, as long as any process of it
lives. Whoever only reads it asks nobody. Of a folder in a bucket each process has a copy."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from stem_jax.bucket_lock import BucketLock
from stem_jax.errors import InputError
from stem_jax.files import check_absent
from stem_jax.local_copy import LocalCopy, copy_folder, naming, uploading
from stem_jax.lock import Lock
from stem_jax.processes.agreement import check_same, check_shared, is_first, unanimous
from stem_jax.processes.process_log import log
from stem_jax.storage import Place, is_remote

LOCK = ".lock"
# How many processes a launcher or a user says that there are.
_COUNTS = "JAX_NUM_PROCESSES", "SLURM_NTASKS"


@contextlib.contextmanager
def writing(workdir: Place) -> Iterator[Lock | BucketLock | None]:
    """Makes the folder if there is none, and holds its lock, in every process of a run.

    Of a folder in a bucket process 0 alone holds it, and the others have None.

    Raises:
        InputError: another run is there, the folder cannot be written, or it is not the same one
            for all processes.
    """
    with contextlib.ExitStack() as stack:
        if is_remote(workdir):
            check_same({"--workdir": str(workdir)})
            with unanimous(), naming(workdir, "--workdir"):
                own = stack.enter_context(_taken_in_bucket(workdir)) if is_first() else None
            yield own
            return
        # Process 0 for all: a run whose first process was killed still has the lock by the others.
        with unanimous(), _writable(workdir):
            if is_first():
                lock = stack.enter_context(_made_and_locked(workdir))
            else:
                _probe(workdir)
        check_shared(workdir)
        with unanimous(), _writable(workdir):
            if not is_first():
                lock = stack.enter_context(Lock.join(workdir / LOCK))
        yield lock


@contextlib.contextmanager
def on_this_machine(workdir: Place, every: float | None) -> Iterator[tuple[Path, LocalCopy | None]]:
    """The folder itself, or this process's copy of one in a bucket, which is uploaded at the end.

    every: seconds after which what changed is uploaded, too; None for at saves and the end alone.
        What a start says of itself is not, until `counts` of the copy is set.

    Raises:
        InputError: see `bucket_errors`.
    """
    if not is_remote(workdir):
        yield workdir, None
        return
    copy = LocalCopy(workdir, own_copy(workdir))
    copy.counts = False
    with unanimous(), naming(workdir, "--workdir"):
        if is_first():
            # What a run that was killed here did not send the other processes have to know.
            copy.fetch()
            copy.upload()
    with unanimous(), naming(workdir, "--workdir"):
        if not is_first():
            copy.fetch()
    with uploading(copy, every, lambda error: log.warning(f"not uploaded: {error}")):
        yield copy.folder, copy


def own_copy(workdir: Place) -> Path:
    """Where `on_this_machine` has the folder of a run that this process trained."""
    if not is_remote(workdir):
        return workdir
    return copy_folder(workdir, f"process_{jax.process_index()}")


@contextlib.contextmanager
def making(workdir: Path) -> Iterator[None]:
    """While a folder is made that appears when it is whole: nobody else makes it meanwhile.

    Raises:
        InputError: it exists, somebody makes it, or nothing can be written beside it.
    """
    check_absent(workdir, "--workdir")
    with _writable(workdir):
        lock = _taken_beside(workdir)
    with lock:
        yield


@contextlib.contextmanager
def held(workdir: Place) -> Iterator[None]:
    """Holds the lock of a folder in a bucket, for one process alone; of a path it does nothing.

    Raises:
        InputError: another run is there; see `bucket_errors`.
    """
    if not is_remote(workdir):
        yield
        return
    with naming(workdir, "--workdir"):
        lock = _taken_in_bucket(workdir)
    with lock:
        yield


def _made_and_locked(workdir: Path) -> Lock:
    if workdir.is_dir():
        return _taken(workdir / LOCK, workdir)
    with _taken_beside(workdir):
        workdir.mkdir(exist_ok=True)
        return _taken(workdir / LOCK, workdir)


def _taken_beside(workdir: Path) -> Lock:
    """Of a folder that does not exist yet."""
    place = workdir.absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    return _taken(place.with_name(f".{place.name}{LOCK}"), workdir)


def _taken(path: Path, workdir: Path) -> Lock:
    # A job that was killed is often started again at once, on other hosts.
    lock = Lock.take(path, patient=True)
    if lock is None:
        raise _in_use(workdir, Lock.holder(path))
    return lock


def _taken_in_bucket(workdir: Place) -> BucketLock:
    path = workdir / LOCK
    lock = BucketLock.take(path)
    if lock is None:
        raise _in_use(workdir, BucketLock.holder(path))
    return lock


def _in_use(workdir: Place, holder: str) -> InputError:
    return InputError(
        f"--workdir={workdir} is in use by {holder}, which trains or imports there; wait until "
        f"that ends, or give another --workdir{_uncounted()}"
    )


def _uncounted() -> str:
    """What to do about processes that do not know of each other."""
    for name in _COUNTS:
        count = os.environ.get(name, "")
        if jax.process_count() == 1 and count.isdecimal() and int(count) > 1:
            return (
                f". {name}={count} is set and --multihost is not given: each of {count} processes "
                "trains by itself; give --multihost to make them one run"
            )
    return ""


def _probe(workdir: Path) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / f".writable-{jax.process_index()}"
    probe.touch()
    probe.unlink()


@contextlib.contextmanager
def _writable(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if workdir.exists() and not workdir.is_dir():
            raise InputError(
                f"--workdir={workdir} is a file, no folder; give the name of a folder"
            ) from error
        raise InputError(
            f"--workdir={workdir} cannot be written ({error.strerror}); choose another folder"
        ) from error
