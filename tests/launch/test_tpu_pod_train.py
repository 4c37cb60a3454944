"""launch/tpu_pod.sh train against a stand-in gcloud: to the end, whatever happens on the way."""

import json
import os
import re
import signal
import sys

import jax
import pytest

from tests.children import train_flags
from tests.launching import SMALL, STEPS, kill_if, wait_until
from tests.pod import SHAPE, WORKDIR, finish


@pytest.mark.long
@pytest.mark.little_effort
def test_end_to_end(pod, tmp_path):
    """Two processes of a real run; one is killed on the way, and the script sees it through."""
    pod.environment["GCLOUD_PYTHON"] = sys.executable
    pod.run("create", *SHAPE)
    pod.run("setup")
    workdir = pod.shared / "run"
    process = pod.start(
        "train",
        *SHAPE,
        "--retries=1",
        f"--env=JAX_COMPILATION_CACHE_DIR={jax.config.jax_compilation_cache_dir}",
        "--env=JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0",
        "--",
        *train_flags("tiny", workdir, SMALL, {}),
    )
    # The first checkpoint is whole.
    wait_until((workdir / "checkpoints" / "10").exists)
    pod.kill("1")
    out, err = finish(process)
    assert "worker 1 lost" in err
    assert "retry 1 of 1" in err and "the run is complete" in err
    [resumed] = re.findall(r"resuming from step (\d+)", out)
    assert 10 <= int(resumed) < STEPS
    assert f"run complete: step {STEPS}" in out
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "train/loss" in record]
    assert sorted(set(steps)) == list(range(1, STEPS + 1))
    out, _ = pod.run("logs")
    assert f"run complete: step {STEPS}" in out
    out, _ = pod.run("logs", "--worker=1")
    assert "Traceback" not in out
    assert "worker 0: exit:0 complete" in pod.run("status")[0]
    _, err = pod.run("delete", "--yes")
    assert "pod in zone-a is not there, and costs nothing" in err


def test_complete_run(ready):
    out, err = ready.train({"0": ["complete"], "1": ["complete"]})
    assert out.startswith("step 1: loss 1.0\n") and out.endswith("run complete: step 9\n")
    assert "the run is complete" in err
    assert "v5litepod-16 pod in zone-a is READY and billed; delete it with: " in err
    out, _ = ready.run("status")
    assert "worker 0: exit:0 complete" in out and "worker 1: exit:0 " in out
    out, _ = ready.run("logs")
    assert "run complete: step 9" in out
    out, _ = ready.run("logs", "--worker=all")
    assert "[0] step 1: loss 1.0" in out


def test_another_program_ends_with_its_work(ready):
    """Which says nothing of a run that is complete, and needs no work folder to share."""
    ready.plan.write_text(json.dumps({"0": [0], "1": [0]}))
    flags = ["--program=evaluate", "--retries=1", *SHAPE]
    _, err = ready.run("train", *flags, "--", f"--plan={ready.plan}", "--niah")
    assert "the run is complete" in err and "retry" not in err
    for start in ready.starts():
        argv = ["-m", "stem_jax.evaluate", "--multihost", f"--plan={ready.plan}", "--niah"]
        assert start["argv"] == argv


def test_dead_worker_is_noticed_while_the_other_hangs(ready):
    out, err = ready.train({"0": ["deaf", "complete"], "1": ["killed", "complete"]}, "--retries=2")
    assert "worker 1 exit:137, 1 running" in err
    assert "killing the run on 1 workers" in err
    assert "retry 1 of 2" in err and "retry 2" not in err
    assert [out.count(f"step {start}: loss") for start in (1, 2)] == [1, 1]
    assert len(ready.starts()) == 4
    assert len(ready.called("queued-resources", "create")) == 1
    # Both runs got the same command.
    assert len({tuple(start["argv"]) for start in ready.starts()}) == 1


@pytest.mark.long
def test_retries_end(ready):
    _, err = ready.train({"0": [75] * 3, "1": ["wait"] * 3}, "--retries=2", code=75)
    assert "no retry is left (--retries=2); the same command continues it" in err
    assert len(ready.starts()) == 6
    assert "is READY and billed" in err


def test_end_before_completion_is_a_loss(ready):
    """What a machine that is shut down does: the run saves, exits 0, and is not complete."""
    process = ready.start_training(
        {"0": ["wait", "complete"], "1": ["wait", "complete"]}, "--retries=1"
    )
    ready.wait_for_starts(2)
    for number in "01":
        home = ready.state / "workers" / number / "stem_jax"
        wait_until((home / "pid").exists)
        os.kill(int((home / "pid").read_text()), signal.SIGTERM)
    out, err = finish(process)
    assert "stopped at step 7" in out and "run complete" in out
    assert "retry 1 of 1" in err


@pytest.mark.parametrize(
    ("plan", "code"), [({"0": [1], "1": [1]}, 1), ({"0": ["wait"], "1": [2]}, 2)]
)
def test_refused_input_is_not_tried_again(ready, plan, code):
    out, err = ready.train(plan, "--retries=5", code=code)
    assert len(ready.starts()) == 2
    assert "refused by plan" in out
    culprit = 0 if code == 1 else 1
    assert f"error: worker {culprit} refused the command" in err
    assert "is READY and billed" in err
    assert "running" not in ready.run("status")[0]


def test_preempted_slice_is_made_again(ready):
    process = ready.start_training(
        {"0": ["wait", "complete"], "1": ["wait", "complete"]}, "--retries=1"
    )
    ready.wait_for_starts(2)
    ready.preempt()
    out, err = finish(process)
    assert "run complete" in out
    assert "pod is SUSPENDED; making it again: v5litepod-16 , spot" in err
    creations = ready.called("queued-resources", "create")
    assert len(creations) == 2 and creations[0] == creations[1]
    assert len(ready.called("queued-resources", "delete")) == 1
    # The new one has the code, too.
    assert len(ready.called("tpu-vm", "scp")) == 1


@pytest.mark.long
def test_machines_that_are_not_to_be_had_at_once(ready):
    """The quota is used up for a while after a preemption."""
    ready.preempt()
    (ready.state / "refusals").write_text("2")
    out, err = ready.train({"0": ["complete"], "1": ["complete"]}, "--retries=3")
    assert "run complete" in out
    assert err.count("RESOURCE_EXHAUSTED: quota") == 2 and "retry 2 of 3" in err
    assert len(ready.called("queued-resources", "delete")) == 1


@pytest.mark.long
def test_machines_that_never_answer_are_made_again(ready):
    process = ready.start_training(
        {"0": ["deaf", "complete"], "1": ["deaf", "complete"]}, "--retries=1", "--silence=2"
    )
    ready.wait_for_starts(2)
    ready.change(cut=[0, 1])
    _, err = finish(process)
    assert "0 of 2 workers answer; pod is READY" in err
    assert "pod is BROKEN; making it again" in err
    assert len(ready.starts()) == 4


def test_preempted_slice_without_retries(ready):
    ready.preempt()
    _, err = ready.train({}, code=75)
    assert "pod is SUSPENDED; delete and create it, or give train --retries=N" in err
    assert "pod in zone-a is SUSPENDED and may be billed; delete it with: " in err
    assert not ready.called("queued-resources", "delete")


@pytest.mark.long
def test_node_that_is_preempted_before_its_queued_resource(ready):
    process = ready.start_training(
        {"0": ["deaf", "complete"], "1": ["deaf", "complete"]}, "--retries=1"
    )
    ready.wait_for_starts(2)
    ready.change(node="PREEMPTED")
    out, err = finish(process)
    assert "run complete" in out
    assert "0 of 2 workers answer; pod is PREEMPTED" in err
    assert len(ready.called("queued-resources", "create")) == 2


@pytest.mark.long
def test_cut_off_workers(ready):
    """If none answers, it waits; if one does not, machines are made again."""
    process = ready.start_training(
        {"0": ["wait", "complete"], "1": ["wait", "complete"]}, "--retries=1"
    )
    ready.wait_for_starts(2)
    asked = len(ready.calls())
    ready.change(cut=[0, 1])
    # More looks than it takes to give up machines of which only some answer.
    wait_until(lambda: len(ready.calls()) > asked + 20)
    assert process.poll() is None
    assert len(ready.starts()) == 2
    ready.change(cut=[1])
    _, err = finish(process)
    assert "1 of 2 workers answer; pod is READY" in err
    assert "pod is BROKEN; making it again" in err
    assert len(ready.starts()) == 4


def test_dropped_connection_to_worker_0(ready):
    process = ready.start_training({"0": ["wait"], "1": ["wait"]})
    assert process.stdout.readline() == "step 1: loss 1.0\n"

    def is_stream(process) -> bool:
        return "worker_follow" in "".join(process.cmdline()) and "--worker=0" in process.cmdline()

    kill_if(is_stream)
    ready.run("stop")
    out, _ = finish(process)
    assert "step 1" not in out
    assert out.count("stopped at step 7") == 1


def test_stop_saves_once_and_ends_a_train_elsewhere(ready):
    process = ready.start_training({"0": ["wait"], "1": ["wait"]}, "--retries=3")
    ready.wait_for_starts(2)
    _, err = ready.run("stop")
    assert "no run on pod; its workers: exit:0 exit:0" in err
    assert "is READY and billed" in err
    out, err = finish(process)
    assert "stopped at step 7" in out
    assert "the run was stopped; the same command continues it" in err
    assert len(ready.starts()) == 2
    _, err = ready.run("stop")
    assert "no run on pod" in err


def test_second_train_attaches(ready):
    first = ready.start_training({"0": ["wait"], "1": ["wait"]})
    ready.wait_for_starts(2)
    _, err = ready.run("setup", code=1)
    assert "has a run going on" in err
    first.send_signal(signal.SIGINT)
    _, err = finish(first, 130)
    assert "is READY and billed" in err
    assert "worker 0: running" in ready.run("status")[0]
    second = ready.start("train", "--", "--other", WORKDIR)
    said = second.stdout.readline()
    assert said == "step 1: loss 1.0\n"
    ready.run("stop")
    out, err = finish(second)
    assert "a run is going on; attaching to it" in err
    assert "stopped at step 7" in out
    assert len(ready.starts()) == 2
