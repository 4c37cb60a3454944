"""The program about runs of real processes that are suspended, killed, stopped and continued."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest

from stem_jax import status
from tests import launching
from tests.children import child, finish, gang, train_flags

pytestmark = [pytest.mark.long, pytest.mark.little_effort]

# As if on another host and its own clocks, on a file system that has no locks.
ABROAD = """
import errno, fcntl, socket
def no_locks(*_):
    raise OSError(errno.ENOLCK, "no locks")
socket.gethostname, fcntl.flock = lambda: "elsewhere", no_locks
from stem_jax.goodput import start_record
start_record.boot = lambda: "of elsewhere"
"""


@pytest.fixture
def told(tmp_path, capsys):
    """What the program says of the folder; with seconds, of silence after which it is stuck."""

    def ask(stuck_after: float | None = None) -> dict:
        flags = [] if stuck_after is None else [f"--stuck-after={stuck_after}"]
        status.main([f"--workdir={tmp_path / 'run'}", "--json", *flags])
        return json.loads(capsys.readouterr().out)

    return ask


def flags(workdir: Path, **values) -> list[str]:
    # So many steps do not end by themselves.
    defaults = {"train.steps": 20_000, "train.log_every": 1, "checkpoint.every": 100}
    defaults["optimizer.schedule_steps"] = 1000
    return train_flags("tiny", workdir, launching.SMALL | defaults, values)


def until(condition, process, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


def test_a_run_from_its_first_start_to_its_end(told, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    assert told()["state"] == "never started"
    with child("-m", "stem_jax.train", *flags(workdir)) as process:
        until(lambda: told()["saves"]["steps"], process)
        found = told()
        assert (found["state"], found["steps"]) == ("running", 20_000)
        assert found["step"] >= 100 and found["loss"] > 0 and found["hours_left"] > 0
        assert found["members"][0]["start"]["pid"] == process.pid
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        found = told(2)
        assert found["state"] == "stuck" and "no record of process 0 for" in found["why"]
        assert told()["state"] == "running"
        process.send_signal(signal.SIGCONT)
        until(lambda: told(2)["state"] == "running", process)
        process.kill()
        process.wait()
        found = told()
        assert found["state"] == "killed" and f"({process.pid} on" in found["why"]
        assert [holder["lives"] for holder in found["holders"]] == [False]
    ended = found["step"]
    with child("-m", "stem_jax.train", *flags(workdir)) as process:
        until(lambda: told()["step"] > ended and told()["state"] == "running", process)
        process.send_signal(signal.SIGTERM)
        finish(process)
    found = told()
    assert found["state"] == "stopped" and found["saves"]["steps"][-1] == found["step"]
    last = found["step"] + 1
    with child("-m", "stem_jax.train", *flags(workdir, train__steps=last)) as process:
        finish(process)
    found = told()
    assert (found["state"], found["step"], found["steps"]) == ("complete", last, last)
    [totals] = found["totals"]
    assert totals["starts"] == 3 and totals["redone"] > 0 and totals["parts"]["restart"] > 0
    assert sum(totals["parts"].values()) == pytest.approx(totals["seconds"])


def test_a_run_of_another_host(told, tmp_path):
    workdir = tmp_path / "run"
    with abroad(workdir) as process:
        until(lambda: workdir.exists() and told()["step"] > 5, process)
        found = told()
        assert found["state"] == "running" and "on host elsewhere" in found["why"]
        [holder] = found["holders"]
        assert (holder["host"], holder["lives"], holder["here"]) == ("elsewhere", True, False)
        process.kill()
        process.wait()
    # Its number tells nothing here; after a minute without renewal it is gone.
    assert told()["state"] == "running"
    old = time.time() - 100
    for path in (workdir / ".lock").iterdir():
        os.utime(path, (old, old))
    os.utime(workdir / "goodput" / "process_000.jsonl", (old, old))
    assert told(50)["state"] == "killed"


def abroad(workdir: Path):
    run = "from stem_jax import cli, train; cli.run(train.main)"
    return child("-c", f"{ABROAD}\n{run}", *flags(workdir))


def test_a_process_of_two_that_is_gone(told, tmp_path):
    workdir = tmp_path / "run"
    first, second = gang("stem_jax.train", flags(workdir), flags(workdir))
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(process) for process in (first, second)]
        until(lambda: workdir.exists() and told()["step"] > 5, processes[0])
        found = told()
        assert found["state"] == "running" and len(found["members"]) == 2
        processes[1].send_signal(signal.SIGSTOP)
        time.sleep(3)
        assert told(2)["state"] == "stuck"
        processes[1].kill()
        processes[1].wait()
        found = told()
        assert (found["state"], found["why"]) == ("stuck", "process 1 of 2 is missing")
        processes[0].kill()
        processes[0].wait()
        found = told()
        assert found["state"] == "killed"
        assert found["why"].startswith("process 0 (") and ", process 1 (" in found["why"]
