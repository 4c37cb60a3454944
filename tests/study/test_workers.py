"""Real processes, which train nothing."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from stem_jax.errors import InputError, TrainingError
from stem_jax.study.job import STOPPED
from stem_jax.study.workers import Stopped, Workers

# Takes the place of the package in the folder whose code trains.
_JOB = f"""
import json, os, signal, sys, time
job = json.load(sys.stdin)
os.sched_setaffinity(0, job["cores"])
if job["kind"] == "fails":
    print("error: no such thing", flush=True)
    sys.exit(1)
if job["kind"] == "waits":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit({STOPPED}))
    open(job["mark"], "w").write(str(os.getpid()))
    time.sleep(60)
open(job["mark"], "w").write(",".join(map(str, os.sched_getaffinity(0))))
"""


@pytest.fixture
def code(tmp_path):
    folder = tmp_path / "code" / "stem_jax" / "study"
    folder.mkdir(parents=True)
    for package in (folder.parent, folder):
        (package / "__init__.py").touch()
    (folder / "job.py").write_text(textwrap.dedent(_JOB))
    return tmp_path / "code"


def _job(tmp_path, name, kind="ends"):
    return {"name": name, "kind": kind, "mark": str(tmp_path / f"{name}.mark")}


def _until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_jobs_run_on_cores_of_their_own(tmp_path, code):
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("one core")
    done = []
    jobs = [_job(tmp_path, f"job{n}") for n in range(4)]
    Workers(2, 1, tmp_path).run(jobs, code, lambda job, seconds: done.append(job["name"]))
    assert sorted(done) == ["job0", "job1", "job2", "job3"]
    marks = [(tmp_path / f"job{n}.mark").read_text() for n in range(4)]
    assert marks[:2] == [str(core) for core in cores]
    assert set(marks) == set(map(str, cores))


def test_a_job_that_fails_ends_the_others(tmp_path, code):
    jobs = [_job(tmp_path, "a", "waits"), _job(tmp_path, "b", "fails"), _job(tmp_path, "c")]
    if len(os.sched_getaffinity(0)) < 2:
        jobs = jobs[1:]
    with pytest.raises(TrainingError, match="run b ended with status 1: error: no such thing"):
        Workers(len(jobs) - 1, 1, tmp_path).run(jobs, code, lambda job, seconds: None)
    assert not (tmp_path / "c.mark").exists()


def test_a_signal_reaches_what_runs(tmp_path, code):
    mark = tmp_path / "a.mark"
    killer = threading.Thread(
        target=lambda: (_until(mark.exists), os.kill(os.getpid(), signal.SIGTERM))
    )
    killer.start()
    jobs = [_job(tmp_path, "a", "waits"), _job(tmp_path, "b")]
    with pytest.raises(Stopped):
        Workers(1, 1, tmp_path).run(jobs, code, lambda job, seconds: None)
    killer.join()
    assert not (tmp_path / "b.mark").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_reaches_what_is_begun_meanwhile(tmp_path, code, monkeypatch):
    job = _job(tmp_path, "a", "waits")
    begin = subprocess.Popen

    def interrupted(*args, **kwargs):
        process = begin(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    start = time.monotonic()
    with pytest.raises(Stopped):
        Workers(1, 1, tmp_path).run([job], code, lambda job, seconds: None)
    assert time.monotonic() - start < 30


def test_a_deadline_ends_what_runs(tmp_path, code):
    jobs = [_job(tmp_path, "a", "waits"), _job(tmp_path, "b")]
    start = time.monotonic()
    with pytest.raises(Stopped):
        Workers(1, 1, tmp_path).run(jobs, code, lambda job, seconds: None, start + 1)
    assert time.monotonic() - start < 30 and not (tmp_path / "b.mark").exists()


_PARENT = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]]).wait()
"""
_CHILD = """
import os, sys, time
from stem_jax.study.job import end_with
end_with(os.getppid())
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only there a child can end with its parent")
def test_a_job_ends_with_its_parent(tmp_path):
    mark = tmp_path / "mark"
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, _CHILD, str(mark)])
    _until(lambda: mark.exists() and mark.read_text())
    parent.kill()
    parent.wait()
    _until(lambda: not _runs(int(mark.read_text())))


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_more_workers_than_cores_are_refused(tmp_path):
    with pytest.raises(InputError, match="lower one of them"):
        Workers(10_000, 1, tmp_path)
