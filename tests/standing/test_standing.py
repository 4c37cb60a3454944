"""What a folder tells of its run, without processes that train."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from stem_jax import status
from stem_jax.errors import InputError
from stem_jax.goodput.account import COMPUTING, PARTS, SAVE, START
from stem_jax.goodput.progress import KeptProgress
from stem_jax.goodput.start_record import COMPLETE, STOPPED, record_path
from stem_jax.lock import Lock, holders
from stem_jax.standing.standing import standing
from stem_jax.standing.text import text


def kept(workdir, process: int = 0, processes: int = 1, steps: int = 5, **changes) -> KeptProgress:
    """A process that made some steps of ten, and did not end yet."""
    progress = KeptProgress(workdir, process, processes, time.monotonic() - 20)
    progress.began(0, 10, 100)
    for name, value in changes.items():
        setattr(progress._record, name, value)
    for step in range(1, steps + 1):
        progress.step_done(step, 2.0, 0.5)
    return progress


def rewritten(workdir, process: int = 0, **changes) -> None:
    """Changes the newest record of a process."""
    path = record_path(workdir, process)
    lines = path.read_text().splitlines()
    values = json.loads(lines[-1]) | changes
    path.write_text("".join(f"{line}\n" for line in [*lines[:-1], json.dumps(values)]))


def checkpoint(workdir, step: int, loss: float | None = None, aside: bool = False) -> None:
    folder = workdir / ("damaged_checkpoints" if aside else "checkpoints") / str(step)
    (folder / "metrics").mkdir(parents=True)
    if loss is not None:
        (folder / "metrics" / "metrics").write_text(json.dumps({"eval/loss": loss}))


def state(workdir, stuck_after: float | None = None) -> str:
    return standing(workdir, stuck_after).state


def test_a_folder_without_a_run_was_never_started(tmp_path):
    assert state(tmp_path) == "never started"
    with pytest.raises(InputError, match="no-such is no folder; give that of a run"):
        standing(tmp_path / "no-such")


def test_a_run_that_ended_by_itself(tmp_path):
    kept(tmp_path).close(None)
    # Without a word it can only have been killed.
    assert state(tmp_path) == "killed"
    rewritten(tmp_path, end=STOPPED)
    assert state(tmp_path) == "stopped"
    rewritten(tmp_path, end=COMPLETE, step=10)
    assert state(tmp_path) == "complete"
    rewritten(tmp_path, end="failed", why="OSError: no")
    found = standing(tmp_path)
    assert (found.state, found.why) == ("failed", "process 0: OSError: no")


def test_figures_of_a_run(tmp_path):
    checkpoint(tmp_path, 2, 3.5)
    checkpoint(tmp_path, 4, 3.0)
    checkpoint(tmp_path, 6)
    checkpoint(tmp_path, 8, aside=True)
    (tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    with Lock.take(tmp_path / ".lock"):
        progress = kept(tmp_path, steps=8)
        rewritten(tmp_path, seconds=30.0, parts={START: 10.0, COMPUTING: 20.0})
        found = standing(tmp_path)
    assert (found.state, found.step, found.steps) == ("running", 8, 10)
    assert (found.loss, found.tokens_per_second, found.step_seconds) == (2.0, 200.0, 0.5)
    assert (found.saves.steps, found.saves.set_aside) == ([2, 4, 6], [8])
    assert (found.saves.best, found.saves.best_loss) == (4, 3.0)
    assert found.hours_left == pytest.approx(2 * 20 / 8 / 3600)
    said = text(found)
    assert "8 of 10 (80%)" in said and "newest 6, of 2, 4, 6; best 4" in said
    assert "damaged, set aside: 8" in said and "seconds  computing  start" in said
    progress.close(None)


def test_files_that_the_newest_checkpoint_lacks(tmp_path):
    kept(tmp_path).close(None)
    for step in (2, 4):
        checkpoint(tmp_path, step, 3.0)
    folder = tmp_path / "checkpoints" / "4"
    assert standing(tmp_path).saves.damage is None
    for facts in ([16, 7], 16):
        files = {"metrics/metrics": facts}
        listed = {"crc32": 1, "files": files} if isinstance(facts, list) else files
        (folder / "files.json").write_text(json.dumps(listed))
        (folder / "metrics" / "metrics").write_text('{"eval/loss": 3}')
        assert standing(tmp_path).saves.damage is None
        (folder / "metrics" / "metrics").write_text('{"eval/loss"')
        assert standing(tmp_path).saves.damage == "metrics/metrics has 12 bytes of 16"
        (folder / "metrics" / "metrics").unlink()
        found = standing(tmp_path)
        assert found.saves.damage == "metrics/metrics is missing"
        assert "of 2, 4; best 2" in text(found)
        assert text(found).count("4 is damaged: metrics/metrics is missing") == 1
    (folder / "files.json").write_text("[")
    assert standing(tmp_path).saves.damage == "files.json is not readable"


def test_silence_of_a_run(tmp_path):
    with Lock.take(tmp_path / ".lock"):
        progress = kept(tmp_path)
        began = progress._record.began_clock
        assert standing(tmp_path).why == f"process {os.getpid()} on host {socket.gethostname()}"
        # Twenty usual steps are 10 s, but two minutes are nothing yet.
        rewritten(tmp_path, began_clock=began - 100)
        assert state(tmp_path) == "running" and state(tmp_path, 50) == "stuck"
        rewritten(tmp_path, began_clock=began - 150)
        assert state(tmp_path) == "stuck"
        # Slow steps may be slow, and a save takes its time, but not for ever.
        rewritten(tmp_path, usual_step_seconds=10.0)
        assert state(tmp_path) == "running"
        rewritten(tmp_path, usual_step_seconds=0.5, doing=SAVE)
        assert state(tmp_path) == "running"
        (tmp_path / "config.json").write_text(json.dumps({"train": {"step_timeout": 60.0}}))
        found = standing(tmp_path)
        assert found.state == "stuck" and "for 150 s in save" in found.why
        progress.close(None)


def test_a_process_that_is_missing(tmp_path):
    with Lock.take(tmp_path / ".lock"):
        first = kept(tmp_path, 0, 2)
        second = kept(tmp_path, 1, 2)
        found = standing(tmp_path)
        assert (found.state, found.why.split(" on host ")[1].split()[1:]) == (
            *("running", ["and", "1", "more"]),
        )
        rewritten(tmp_path, 1, pid=1)
        found = standing(tmp_path)
        assert (found.state, found.why) == ("stuck", "process 1 of 2 is missing")
        # Before the first step others may not have begun.
        rewritten(tmp_path, 0, first_step=None)
        assert state(tmp_path) == "running"
        assert "starts" in standing(tmp_path).why
        for progress in (first, second):
            progress.close(None)
    assert state(tmp_path) == "killed"


def test_processes_of_earlier_shapes_count_no_more(tmp_path):
    for process in range(4):
        kept(tmp_path, process, 4).close(None)
    time.sleep(0.01)
    kept(tmp_path, 0, 1).ended(COMPLETE)
    rewritten(tmp_path, 0, end=COMPLETE)
    found = standing(tmp_path)
    assert found.state == "complete" and len(found.members) == 1 and len(found.totals) == 4


def test_a_host_whose_lock_is_not_seen_here(tmp_path):
    """Its records tell; when they are old nothing does, and it counts as gone."""
    kept(tmp_path).close(None)
    rewritten(tmp_path, host="elsewhere", boot="of elsewhere")
    path = tmp_path / ".lock"
    path.mkdir()
    facts = {"host": "elsewhere", "boot": "b", "container": "c", "pid": 9, "since": "1"}
    record = path / f"{time.time_ns():020d}-9-abc"
    # flock of this machine alone finds nobody.
    record.write_text(json.dumps(facts | {"locked": True}) + "\nheld\n")
    rewritten(tmp_path, pid=9)
    [holder] = holders(path)
    assert (holder.host, holder.pid, holder.lives, holder.here) == ("elsewhere", 9, False, False)
    found = standing(tmp_path)
    assert found.state == "running" and "on host elsewhere, whose lock" in found.why
    old = time.time() - 1000
    os.utime(record_path(tmp_path, 0), (old, old))
    found = standing(tmp_path, 100)
    assert found.state == "killed" and "9 on elsewhere" in found.why
    assert "or frozen: nothing is heard of it" in found.why
    # Without locks the age of its lock's record tells.
    record.write_text(json.dumps(facts | {"locked": False}) + "\nheld\n")
    assert holders(path)[0].lives
    assert standing(tmp_path, 10_000).state == "running"
    os.utime(record, (old, old))
    assert not holders(path)[0].lives


def test_runs_of_before_there_were_records(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"train": {"steps": 8}}))
    checkpoint(tmp_path, 4)
    found = standing(tmp_path)
    assert (found.state, found.step, found.steps) == ("stopped", 4, 8)
    checkpoint(tmp_path, 8)
    assert state(tmp_path) == "complete"
    with Lock.take(tmp_path / ".lock"):
        assert state(tmp_path) == "running"


def test_the_program(tmp_path, capsys):
    kept(tmp_path).close(None)
    status.main([f"--workdir={tmp_path}"])
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path}: killed (process 0 (")
    status.main([f"--workdir={tmp_path}", "--json", "--stuck-after=3"])
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "killed" and found["members"][0]["start"]["step"] == 5
    assert found["totals"][0]["parts"].keys() == set(PARTS)
    assert found["totals"][0]["parts"][COMPUTING] == 0
    with pytest.raises(InputError, match="--stuck-after=0 must be above 0 seconds"):
        status.main([f"--workdir={tmp_path}", "--stuck-after=0"])


def test_it_answers_without_jax():
    heavy = "{'jax', 'numpy', 'orbax', 'flax'}"
    check = f"import sys, stem_jax.status; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
