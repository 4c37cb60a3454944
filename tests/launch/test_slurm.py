"""launch/slurm.sbatch against a stand-in srun, whose tasks are processes here."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests import effort
from tests.children import ROOT, train_flags
from tests.launching import (
    SMALL,
    STAND_INS,
    STEPS,
    kill_if,
    notes,
    wait_for_checkpoint,
    wait_until,
)


class Job:
    """A job of two tasks on one node, as the batch script sees it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.started = contextlib.ExitStack()
        self.plan = folder / "plan.json"
        self.state = folder / "slurm"
        self.state.mkdir()
        (folder / "bin").mkdir()
        for name in ("srun", "scancel", "squeue", "scontrol"):
            (folder / "bin" / name).symlink_to(STAND_INS / "slurm.py")
        # Whatever module it is asked for, it runs the stand-in.
        self.trainer = folder / "trainer"
        trainer = shlex.join([sys.executable, str(STAND_INS / "trainer.py")])
        self.trainer.write_text(f'#!/bin/sh\nexec {trainer} "$@"\n')
        self.trainer.chmod(0o755)
        # Slurm starts a copy that lies elsewhere.
        self.script = shutil.copy(ROOT / "launch" / "slurm.sbatch", folder / "slurm_script")
        self.environment = os.environ | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "STEM_PYTHON": str(self.trainer),
            "SLURM_STATE": str(self.state),
            "SLURM_SUBMIT_DIR": str(ROOT),
            # JAX derives the coordinator's port from it.
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_GPUS_ON_NODE": "2",
            "SLURM_CPUS_PER_TASK": "3",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": effort.flags(),
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        }

    def start(self, *flags: str, **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [self.script, *flags],
            env=self.environment | environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return self.started.enter_context(process)

    def start_plan(self, plan: dict[str, list], *flags: str, **environment: str):
        self.plan.write_text(json.dumps(plan))
        return self.start(f"--plan={self.plan}", *flags, **environment)

    def run_plan(self, plan: dict[str, list], *flags: str, code: int = 0, **environment: str):
        """What a job with the stand-in trainer printed; plan: what each start does, by process."""
        return finish(self.start_plan(plan, *flags, **environment), code)

    def starts(self) -> list[dict]:
        path = Path(f"{self.plan}.started")
        return notes(path)

    def requeues(self) -> int:
        calls = (self.state / "calls.jsonl").read_text().splitlines()
        return calls.count(json.dumps(["scontrol", "requeue", self.environment["SLURM_JOB_ID"]]))

    def wait_for_starts(self, number: int) -> None:
        wait_until(lambda: len(self.starts()) >= number and (self.state / "step").exists())

    def kill(self) -> None:
        kill_if(lambda process: process.environ().get("SLURM_STATE") == str(self.state))


def finish(process: subprocess.Popen, code: int = 0) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == code, out[-5000:]
    return out


@pytest.fixture
def job(tmp_path):
    job = Job(tmp_path)
    with job.started:
        yield job
        job.kill()


@pytest.mark.long
@pytest.mark.little_effort
def test_end_to_end(job):
    """A real run of two tasks is told to stop, saves, is queued again, and gets to its end."""
    job.environment["STEM_PYTHON"] = sys.executable
    workdir = job.folder / "run"
    flags = train_flags("tiny", workdir, SMALL, {"optimizer__schedule_steps": STEPS})
    # It cannot get to its end before it is told to stop.
    process = job.start(*flags, "--config.train.steps=100000")
    wait_for_checkpoint(workdir, process, 10)
    process.send_signal(signal.SIGTERM)
    out = finish(process)
    [stopped] = re.findall(r"stopped at step (\d+); the same command continues", out)
    assert int(stopped) >= 10
    assert job.requeues() == 1
    end = int(stopped) + STEPS
    out = finish(job.start(*flags, f"--config.train.steps={end}", SLURM_RESTART_COUNT="1"))
    assert f"resuming from step {stopped}" in out
    assert f"run complete: step {end}" in out
    assert job.requeues() == 1
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "train/loss" in record]
    assert steps == list(range(1, end + 1))


def test_arguments_arrive_as_given(job):
    odd = ["--a=b c", "--quotes='\"`", "--shell=$HOME $(false) *?[a] ; & | \\", "--lines=1\n2", ""]
    job.run_plan({"0": ["complete"], "1": ["complete"]}, *odd)
    assert sorted(start["process"] for start in job.starts()) == ["0", "1"]
    for start in job.starts():
        expected = ["-m", "stem_jax.train", "--multihost", f"--plan={job.plan}", *odd]
        assert start["argv"] == expected
        assert start["folder"] == str(ROOT)
        assert start["environment"]["SRUN_CPUS_PER_TASK"] == "3"
        assert "JAX_LOCAL_DEVICE_IDS" not in start["environment"]
    assert job.requeues() == 0


def test_another_program_ends_with_its_work(job):
    job.plan.write_text(json.dumps({"0": [0], "1": [0]}))
    finish(job.start("--program=evaluate", f"--plan={job.plan}"))
    for start in job.starts():
        assert start["argv"] == ["-m", "stem_jax.evaluate", "--multihost", f"--plan={job.plan}"]
    assert job.requeues() == 0


def test_a_program_that_there_is_not(job):
    out = finish(job.start("--program=evaluation"), 1)
    assert "slurm.sbatch: error: --program=evaluation is none of stem_jax's" in out


def test_one_process_per_node_takes_all_gpus(job):
    plan = {"0": ["complete"], "1": ["complete"]}
    job.run_plan(plan, SLURM_NTASKS_PER_NODE="1", SLURM_GPUS_ON_NODE="8")
    assert {start["environment"]["JAX_LOCAL_DEVICE_IDS"] for start in job.starts()} == {
        "0,1,2,3,4,5,6,7"
    }


@pytest.mark.parametrize(
    ("plan", "code"), [({"0": [1], "1": ["deaf"]}, 1), ({"0": [2], "1": [2]}, 2)]
)
def test_refused_input_is_not_queued_again(job, plan, code):
    out = job.run_plan(plan, code=code)
    assert re.search(r"error: process [01]: refused by plan", out)
    assert "the command was refused; not trying again" in out
    assert job.requeues() == 0


@pytest.mark.parametrize("end", ["killed", 75, 134])
def test_a_lost_process_queues_the_job_again(job, end):
    out = job.run_plan({"0": ["deaf", "complete"], "1": [end, "complete"]})
    code = 137 if end == "killed" else end
    assert f"slurm.sbatch: process 1 exited with {code}\n" in out
    assert job.requeues() == 1
    assert "run complete" in job.run_plan(
        {"0": ["deaf", "complete"], "1": [end, "complete"]}, SLURM_RESTART_COUNT="1"
    )
    assert job.requeues() == 1


def test_it_is_queued_again_so_many_times(job):
    out = job.run_plan(
        {"0": [75], "1": [75]}, code=75, SLURM_RESTART_COUNT="3", STEM_MAX_REQUEUES="3"
    )
    assert "not complete after 3 restarts (STEM_MAX_REQUEUES)" in out
    assert job.requeues() == 0


@pytest.mark.parametrize("seconds", ["0", "3"])
def test_a_cancelled_job_stays_cancelled(job, seconds):
    # The run may be gone before scancel returns; its status is what counts.
    process = job.start_plan({"0": ["wait"], "1": ["wait"]}, SCANCEL_SECONDS=seconds)
    job.wait_for_starts(2)
    (job.state / "state").write_text("COMPLETING")
    process.send_signal(signal.SIGTERM)
    out = finish(process)
    assert out.count("stopped at step 7") == 2
    assert "the job is COMPLETING; leaving it to Slurm" in out
    assert job.requeues() == 0


def test_a_run_can_be_stopped_for_good(job):
    process = job.start_plan({"0": ["wait"], "1": ["wait"]})
    job.wait_for_starts(2)
    process.send_signal(signal.SIGUSR1)
    out = finish(process)
    assert out.count("stopped at step 7") == 2
    assert "stopped; the same command continues the run" in out
    assert job.requeues() == 0


def test_a_run_that_does_not_save_in_time_is_queued_again(job):
    process = job.start_plan({"0": ["deaf"], "1": ["deaf"]}, STEM_SAVE_SECONDS="0.5")
    job.wait_for_starts(2)
    process.send_signal(signal.SIGTERM)
    assert "not complete (exit code 137); queueing the job again" in finish(process)
    assert job.requeues() == 1


def test_submitted_from_elsewhere(job):
    out = finish(job.start(SLURM_SUBMIT_DIR=str(job.folder)), 1)
    assert f"error: submit from the repository, not from {job.folder}" in out
