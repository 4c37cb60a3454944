"""One run at a time writes a work folder, and the folder is free when its last process is gone."""

import contextlib
import errno
import os
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from stem_jax import lock as lock_module
from stem_jax.data.preparation import Preparation
from stem_jax.errors import InputError
from stem_jax.lock import Lock
from stem_jax.work_folder import making, writing
from tests import launching
from tests.children import child, finish, gang, train_flags

pytestmark = pytest.mark.little_effort

HOST = os.uname().nodename
# Steps without end: who is not refused goes on until it is stopped.
STEPS = {"train.steps": 100_000, "optimizer.schedule": "constant", "checkpoint.every": 2}
MODES = {"locks": 0, "none": errno.ENOLCK}


def in_use(workdir: Path, pid: int) -> str:
    return f"--workdir={workdir} is in use by process {pid} on host {HOST}, which trains or imports"


def refused(why: str):
    return pytest.raises(InputError, match=re.escape(why))


def test_the_second_is_refused_by_name(tmp_path):
    workdir = tmp_path / "a" / "run"
    with writing(workdir), refused(in_use(workdir, os.getpid())), writing(workdir):
        pass
    assert list(workdir.iterdir()) == []
    with writing(workdir):
        pass


def test_a_folder_that_is_being_made_is_in_use(tmp_path):
    """An import works beside its folder, which does not exist until it is whole."""
    workdir = tmp_path / "run"
    with making(workdir):
        for another in (making, writing):
            with refused(in_use(workdir, os.getpid())), another(workdir):
                pass
        assert not workdir.exists()
    with writing(workdir):
        assert workdir.is_dir()
        # Nothing is left beside it that would keep others from it.
        assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("name", ["JAX_NUM_PROCESSES", "SLURM_NTASKS"])
def test_processes_that_do_not_know_of_each_other(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "8")
    why = f"{name}=8 is set and --multihost is not given: each of 8 processes trains by itself"
    with writing(tmp_path), pytest.raises(InputError, match=why), writing(tmp_path):
        pass
    monkeypatch.setenv(name, "1")
    with writing(tmp_path), pytest.raises(InputError) as error, writing(tmp_path):
        pass
    assert "--multihost" not in str(error.value)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    workdir = tmp_path / "file" / "run"
    with refused(f"--workdir={workdir} cannot be written ("), writing(workdir):
        pass


def test_files_that_have_the_name_of_a_folder_are_told(tmp_path):
    file, lock = tmp_path / "file", tmp_path / "run" / ".lock"
    lock.parent.mkdir()
    for path in (file, lock, tmp_path / "run" / ".prepare.lock"):
        path.write_text("mine")
    with refused(f"--workdir={file} is a file, no folder"), writing(file):
        pass
    with refused(f"{file} is a file, no folder"), Preparation(file, None):
        pass
    told = f"--workdir={lock.parent} cannot be written ({lock} is a file, where a lock shall be: mo"
    with refused(told), writing(lock.parent):
        pass
    with refused(".prepare.lock is a file, where a lock shall be"), Preparation(lock.parent, None):
        pass
    assert lock.read_text() == file.read_text() == "mine"


def test_a_folder_of_another_user_is_in_use(tmp_path, monkeypatch):
    """Root reads everything: so it is the calls that refuse here."""

    def hide(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    with writing(tmp_path):
        [record] = (tmp_path / ".lock").iterdir()
        os.utime(record, (0, 0))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", hide)
            who = f"--workdir={tmp_path} is in use by another user, whose record {record} is not re"
            with refused(who), writing(tmp_path):
                pass
        assert record.exists()
        monkeypatch.setattr(os, "open", hide)
        who = f"(in use by another user, or not readable: {tmp_path / '.lock'})"
        with refused(who), writing(tmp_path):
            pass


def test_a_folder_taken_while_this_process_stood_still(tmp_path):
    with writing(tmp_path) as lock:
        assert lock.lost_to() is None
        for record in (tmp_path / ".lock").iterdir():
            record.unlink()
        with Lock.take(tmp_path / ".lock"):
            assert lock.lost_to() == f"process {os.getpid()} on host {HOST}"


def without_locks(tmp_path: Path, error: int) -> dict[str, str]:
    """The environment of children whose file system has no locks; {} for 0."""
    code = f"import fcntl\ndef none(*_): raise OSError({error}, 'no locks')\nfcntl.flock = none\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": f"{tmp_path}:{launching.ROOT}"} if error else {}


def wait_for_checkpoint(workdir: Path, process: subprocess.Popen) -> None:
    def is_there():
        assert process.poll() is None, process.stdout.read()[-3000:]
        folder = workdir / "checkpoints"
        return folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())

    launching.wait_until(is_there)


@pytest.mark.long  # tests/test_lock.py kills a process that holds a lock
@pytest.mark.parametrize("mode", MODES)
def test_a_second_training_is_refused_until_the_first_is_killed(tmp_path, mode):
    workdir = tmp_path / "run"
    argv = ["-m", "stem_jax.train", *train_flags("tiny", workdir, launching.SMALL | STEPS, {})]
    environment = without_locks(tmp_path, MODES[mode])
    with child(*argv, **environment) as first:
        wait_for_checkpoint(workdir, first)
        with child(*argv, **environment, SLURM_NTASKS="2") as second:
            out = finish(second, code=1)
        assert f"error: {in_use(workdir, first.pid)}" in out
        assert "SLURM_NTASKS=2 is set and --multihost is not given" in out
        # It left the folder of the first alone.
        assert len(re.findall("process 0 on", _log(workdir))) == 1
        first.send_signal(signal.SIGKILL)
        # Not waited for: a dead process whose parent does not ask holds nothing.
        launching.wait_until(lambda: psutil.Process(first.pid).status() == "zombie")
        _goes_on([child(*argv, **environment)], workdir)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["locks", pytest.param("none", marks=pytest.mark.nightly)])
def test_of_two_processes_the_last_one_counts(tmp_path, mode):
    workdir = tmp_path / "run"
    argv = train_flags("tiny", workdir, launching.SMALL | STEPS, {})
    environment, commands = without_locks(tmp_path, MODES[mode]), [argv, argv]
    with contextlib.ExitStack() as stack:
        first = [stack.enter_context(p) for p in gang("stem_jax.train", *commands, **environment)]
        wait_for_checkpoint(workdir, first[0])
        _are_refused(gang("stem_jax.train", *commands, **environment), workdir, first[0].pid)
        # It hangs, and so outlives process 0.
        first[1].send_signal(signal.SIGSTOP)
        first[0].kill()
        first[0].wait()
        _are_refused(gang("stem_jax.train", *commands, **environment), workdir, first[1].pid)
        _are_refused([child("-m", "stem_jax.train", *argv, **environment)], workdir, first[1].pid)
        first[1].kill()
        first[1].wait()
        _goes_on(gang("stem_jax.train", *commands, **environment), workdir)


def _are_refused(processes: list, workdir: Path, pid: int) -> None:
    with contextlib.ExitStack() as stack:
        for process in [stack.enter_context(process) for process in processes]:
            assert in_use(workdir, pid) in finish(process, code=1)


def _goes_on(processes: list, workdir: Path) -> None:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(process) for process in processes]
        begun = (workdir / "metrics.jsonl").stat().st_size
        launching.wait_until(lambda: "resuming from step" in _log(workdir))
        launching.wait_until(lambda: (workdir / "metrics.jsonl").stat().st_size > begun)
        found[-1].send_signal(signal.SIGTERM)
        outs = [finish(process) for process in found]
    assert "stopped at step" in outs[0] and not (workdir / ".lock").exists()


def _log(workdir: Path) -> str:
    return (workdir / "logs" / "process_000.log").read_text()


def test_an_import_is_refused_while_another_makes_the_folder(tmp_path, monkeypatch):
    from stem_jax.import_torch import main

    monkeypatch.setattr(lock_module, "_DECIDING_SECONDS", 0.1)
    workdir = tmp_path / "run"
    with making(workdir), pytest.raises(InputError, match="is in use by process"):
        main(["--from=hf", f"--path={tmp_path}", f"--workdir={workdir}"])
