"""launch/tpu_pod.sh with several slices, and --elastic, against a stand-in gcloud."""

import re
import shutil
import signal
import sys

import pytest

from launch.elastic_pod import check_slices, slice_devices
from stem_jax.errors import InputError
from tests.children import train_flags
from tests.launching import wait_until
from tests.pod import SHAPE, WORKDIR, finish

pytestmark = pytest.mark.little_effort

TWO = ["--slices=2"]
ELASTIC = [*TWO, "--elastic"]


@pytest.fixture
def slices(pod, workers_with_code):
    """What makes two slices with code on them, of one queued resource or of two."""
    pod.environment["PYTHON"] = sys.executable

    def make(*flags: str):
        pod.run("create", *SHAPE, *flags)
        for number in range(4):
            home = pod.state / "workers" / str(number)
            shutil.copytree(workers_with_code / "0", home, symlinks=True, dirs_exist_ok=True)
        return pod

    return make


def test_create_and_setup(pod):
    _, err = pod.run("create", *SHAPE, *TWO)
    [call] = pod.called("queued-resources", "create")
    assert call[4:] == [
        *("pod", "--node-count=2", "--node-prefix=pod", "--zone=zone-a"),
        *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"),
    ]
    assert "next: launch/tpu_pod.sh setup --name=pod --zone=zone-a --slices=2" in err
    _, err = pod.run("setup", *TWO)
    assert "code and packages are on 4 workers" in err
    assert [call[5] for call in pod.called("tpu-vm", "scp")] == [
        f"pod-{number}:stem_jax_code.tar.gz" for number in (0, 1)
    ]
    out, _ = pod.run("status", *TWO)
    assert out.splitlines() == [
        "pod in zone-a: READY, 4 workers answer",
        *(f"worker {number}: idle " for number in range(4)),
    ]
    _, err = pod.run("delete", "--yes", *TWO)
    assert "pod in zone-a is not there, and costs nothing" in err


def test_slices_find_each_other(slices):
    """By the variables that JAX and libtpu read; of all workers the first one is shown."""
    pod = slices(*TWO)
    out, err = pod.train({str(process): ["complete"] for process in range(4)}, *TWO)
    assert out.startswith("step 1: loss 1.0\n") and out.endswith("run complete: step 9\n")
    assert "starting on 4 workers" in err and "the run is complete" in err
    starts = {start["process"]: start["environment"] for start in pod.starts()}
    assert sorted(starts) == ["0", "1", "2", "3"]
    for process, environment in starts.items():
        assert environment["MEGASCALE_COORDINATOR_ADDRESS"] == "address-of-pod-0"
        assert environment["MEGASCALE_NUM_SLICES"] == "2"
        assert environment["MEGASCALE_SLICE_ID"] == str(int(process) // 2)
        assert environment["HOME"].endswith(f"workers/{process}")
    out, _ = pod.run("logs", "--worker=all", *TWO)
    assert "[0] step 1: loss 1.0" in out


@pytest.mark.long
def test_all_slices_are_made_again_when_one_is_lost(slices):
    pod = slices(*TWO)
    plan = {str(process): ["wait", "complete"] for process in range(4)}
    process = pod.start_training(plan, *TWO, "--retries=1")
    pod.wait_for_starts(4)
    pod.preempt(workers=("2", "3"))
    out, err = finish(process)
    assert "run complete" in out and "pod is SUSPENDED; making it again" in err
    assert len(pod.called("queued-resources", "create")) == 2
    assert len(pod.starts()) == 8


@pytest.mark.long
def test_elastic(slices, tmp_path):
    """A lost slice is made again by itself while the other goes on, and taken back at a save."""
    pod = slices(*ELASTIC)
    assert [call[4:6] for call in pod.called("queued-resources", "create")] == [
        [f"pod-{number}", f"--node-id=pod-{number}"] for number in (0, 1)
    ]
    workdir = tmp_path / "run"
    (workdir / "checkpoints" / "12").mkdir(parents=True)
    plan = pod.plan
    plan.write_text(
        '{"0": ["wait", "wait", "wait"], "1": ["wait", "wait", "wait"],'
        ' "2": ["wait", "wait"], "3": ["wait", "wait"]}'
    )
    keys = {"train.global_batch_size": 64, "tables.pad_multiple": 32}
    flags = [f"--plan={plan}", *train_flags("tiny", workdir, keys, {})]
    process = pod.start("train", *SHAPE, *ELASTIC, "--retries=1", "--", *flags)
    pod.wait_for_starts(4)
    pod.preempt("pod-1", ("2", "3"))
    pod.wait_for_starts(6)
    small = pod.starts()[4:]
    assert sorted(start["process"] for start in small) == ["0", "1"]
    for start in small:
        assert "--config.mesh.data=16" in start["argv"]
        assert "MEGASCALE_NUM_SLICES" not in start["environment"]
    wait_until(lambda: len(pod.called("queued-resources", "create")) == 3)
    # The new one has its code: the run ends with its next save, and goes on with both.
    wait_until(lambda: (pod.state / "workers" / "3" / "stem_jax" / "venv").exists())
    (workdir / "checkpoints" / "24").mkdir()
    for number in range(36, 3000, 12):
        if len(pod.starts()) >= 10 or process.poll() is not None:
            break
        (workdir / "checkpoints" / str(number)).mkdir()
        with_pause(lambda: len(pod.starts()) >= 10)
    large = pod.starts()[6:]
    assert sorted(start["process"] for start in large) == ["0", "1", "2", "3"]
    assert all("--config.mesh.data=32" in start["argv"] for start in large)
    out, _ = pod.run("status", *ELASTIC)
    assert "pod in zone-a: READY, 4 workers answer" in out
    pod.run("stop", *ELASTIC)
    _, err = finish(process)
    assert re.findall("elastic: starting on hosts (.*)", err) == [
        *("0, 1 with mesh.data=32", "0 with mesh.data=16", "0, 1 with mesh.data=32")
    ]
    assert "elastic: 2 hosts answer; the next save is the last of this size" in err
    for number in (0, 1):
        assert f"v5litepod-16 pod-{number} in zone-a is READY and billed" in err
    _, err = pod.run("delete", "--yes", *ELASTIC)
    assert err.count("is not there, and costs nothing") == 2


def with_pause(condition) -> None:
    """Waits for it, three seconds at most."""
    try:
        wait_until(condition, seconds=3)
    except AssertionError:
        return


@pytest.mark.long
def test_elastic_ends_with_refused_input_and_by_signal(slices, tmp_path):
    pod = slices(*ELASTIC)
    flags = [f"--plan={pod.plan}", *train_flags("tiny", tmp_path / "run", {}, {})]
    pod.plan.write_text('{"0": [1, "wait"], "1": [1, "wait"], "2": [1, "wait"], "3": [1, "wait"]}')
    keys = ["--config.train.global_batch_size=64", "--config.tables.pad_multiple=32"]
    _, err = pod.run("train", *SHAPE, *ELASTIC, "--", *flags, *keys, code=1)
    assert err.count("elastic: starting on hosts") == 1 and "refused the command" in err
    process = pod.start("train", *SHAPE, *ELASTIC, "--", *flags, *keys)
    pod.wait_for_starts(8)
    process.send_signal(signal.SIGTERM)
    _, err = finish(process)
    assert "the run was stopped" in err
    assert "running" not in pod.run("status", *ELASTIC)[0]


@pytest.mark.parametrize("flags", [TWO, ELASTIC])
def test_a_dry_run_prints_all_of_it(pod, flags):
    pod.environment["PYTHON"] = sys.executable
    keys = {"train.global_batch_size": 64, "tables.pad_multiple": 32}
    training = train_flags("tiny", "gs://b/run", keys, {})
    out, err = pod.run("train", "--dry-run", *SHAPE, *flags, "--", *training)
    assert not pod.calls() and "no retry is left" not in err
    starts = [line for line in out.splitlines() if "worker_start stem_jax" in line]
    assert [line.split()[6] for line in sorted(starts, key=lambda line: line.split()[6])] == [
        *("pod-0", "pod-1"),
    ]
    lines = out.splitlines()
    if flags is ELASTIC:
        [decides] = [line for line in lines if line.startswith(f"+ {sys.executable} -m")]
        assert "launch.elastic_pod 2 v5litepod-16" in decides and "--dry-run" not in decides
        assert all("--config.mesh.data=32" in line for line in starts)
        # Each slice by itself is asked whether it is ready.
        for number in (0, 1):
            asked = f"+ gcloud compute tpus queued-resources describe pod-{number} "
            assert any(line.startswith(asked) for line in lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--slices=0"], "--slices=0 must be a number"),
        (["--elastic"], "--slices=1 must be a number, at least 2 for --elastic"),
        ([*ELASTIC, "--program=evaluate"], "not --program=evaluate"),
    ],
)
def test_wrong_flags(pod, flags, message):
    _, err = pod.run("train", *SHAPE, *flags, "--", WORKDIR, code=2)
    assert message in err.splitlines()[0]


def test_devices_of_a_slice(tiny_config):
    assert [slice_devices(kind, "") for kind in ("v5litepod-16", "v6e-8", "v4-32", "v5p-8")] == [
        *(16, 8, 16, 4)
    ]
    assert slice_devices("v4", "2x2x4") == 16
    for kind, topology in (("v9-8", ""), ("v4", ""), ("v4", "2xx")):
        with pytest.raises(InputError, match="does not say how many devices a slice has"):
            slice_devices(kind, topology)
    config = tiny_config(**{"mesh.fsdp": 8, "train.global_batch_size": 64})
    check_slices(config, 16)
    with pytest.raises(InputError, match=r"mesh\.fsdp=8 .* do not divide over the 4 devices of a"):
        check_slices(config, 4)
    with pytest.raises(InputError, match=r"mesh\.fsdp=-1 takes"):
        check_slices(tiny_config(**{"mesh.fsdp": -1, "mesh.data": 1}), 4)
