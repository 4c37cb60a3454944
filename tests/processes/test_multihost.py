"""Several processes as one run: real processes over gloo, real signals, what they refuse.

Its own child: `python .../test_multihost.py FOLDER CONFIG...` digests every global batch.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest
from jax.experimental import multihost_utils

from stem_jax import train
from stem_jax.config_file import config_from_json
from stem_jax.context_order import slots
from stem_jax.data.loader import Share
from stem_jax.errors import InputError
from stem_jax.mesh import AXES, BATCH_AXES, CONTEXT, axis_size, make_mesh, own_batch_shards
from stem_jax.processes.agreement import is_first
from stem_jax.processes.cluster import Gang, join
from stem_jax.training.run_data import open_run_data
from stem_jax.training.step import TrainStep
from tests import effort, launching
from tests.children import ROOT, child, finish, free_port, gang, train_flags

PROGRAM = "stem_jax.train"
STEPS = 30
SMALL = launching.SMALL | {"train.steps": STEPS, "eval.every": 15, "eval.max_batches": 6}
PLACES = {"resident": {}, "offloaded": {"tables__resident_rows": 256}}
# After which JAX misses the heartbeat of a process that is suspended.
HEARTBEAT_SECONDS = 100
pytestmark = pytest.mark.little_effort


def flags(workdir: Path, **overrides) -> list[str]:
    return train_flags("tiny", workdir, SMALL, overrides)


@contextlib.contextmanager
def local_multihost(*argv: str):
    """launch/local_multihost.sh with the compilation cache of all tests."""
    settings = {
        "XLA_FLAGS": effort.flags(),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "GRACE_SECONDS": "3",
        "PYTHON": sys.executable,
    }
    script = subprocess.Popen(
        ["launch/local_multihost.sh", *argv],
        cwd=ROOT,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with script:
        try:
            yield script
        finally:
            for process in members(script):
                process.kill()
            script.kill()


def members(script: subprocess.Popen) -> list[psutil.Process]:
    """The training processes of a script, in their order."""
    found = {}
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(script.pid).children(recursive=True):
            index = re.search(r"--process-index=(\d+)", " ".join(process.cmdline()))
            if index:
                found[int(index[1])] = process
    return [found[index] for index in sorted(found)]


def wait_for_step(workdir: Path, script: subprocess.Popen, step: int) -> None:
    deadline = time.monotonic() + 300
    while not (values(workdir, "train/loss") or {0: 0.0}).keys() >= {step}:
        assert script.poll() is None, script.stdout.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def values(workdir: Path, key: str) -> dict[int, float]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return {record["step"]: record[key] for record in records if key in record}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run of one process with eight devices and all rows resident."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    with child("-m", "stem_jax.train", *flags(workdir), devices=8) as process:
        finish(process)
    return workdir


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """two_processes(place): the folder of a whole run of two processes with four devices each."""

    @functools.cache
    def run(place: str) -> Path:
        workdir = tmp_path_factory.mktemp(place) / "run"
        with local_multihost("2", *flags(workdir, **PLACES[place])) as script:
            finish(script)
        return workdir

    return run


def assert_same_losses(workdir: Path, other: Path) -> None:
    """Up to two rounding steps of a float32 near 6: reductions add in another order."""
    for key, count in (("train/loss", STEPS), ("eval/loss", 2)):
        found, expected = values(workdir, key), values(other, key)
        assert len(expected) == count and expected.keys() <= found.keys()
        for step, value in expected.items():
            assert found[step] == pytest.approx(value, rel=0, abs=1e-6), (key, step)


@pytest.mark.long
@pytest.mark.parametrize("place", PLACES)
def test_two_processes_equal_one(alone, two_processes, place):
    workdir = two_processes(place)
    assert_same_losses(workdir, alone)
    # Everything is said once on the terminal, and by each process in its own file.
    logs = [(workdir / "logs" / f"process_{i:03d}.log").read_text() for i in range(2)]
    for log in logs:
        assert log.count("run complete: step 30") == 1
        assert re.search(r"first step \(1\) [\d.]+ s after the start: joining [\d.]+, data", log)
    assert "process 1 on " in logs[1]
    assert values(workdir, "train/startup_seconds").keys() == {1}


@pytest.mark.long
def test_sigterm_to_one_process_saves_once_and_others_go_on(alone, tmp_path):
    workdir = tmp_path / "run"
    with local_multihost("2", *flags(workdir)) as script:
        wait_for_step(workdir, script, 3)
        members(script)[1].send_signal(signal.SIGTERM)
        out = finish(script)
    stopped = int(re.search(r"stopped at step (\d+); the same command continues", out)[1])
    assert 3 <= stopped < STEPS
    assert (workdir / "checkpoints" / str(stopped)).is_dir()
    # The script passes its own signal on. Twice as many processes continue.
    with local_multihost("4", "--devices=2", *flags(workdir)) as script:
        wait_for_step(workdir, script, stopped + 2)
        script.send_signal(signal.SIGTERM)
        out = finish(script)
    assert f"resuming from step {stopped}\n" in out
    again = re.search(r"stopped at step (\d+);", out)
    with child("-m", "stem_jax.train", *flags(workdir), devices=8) as process:
        out = finish(process)
    assert not again or f"resuming from step {again[1]}\n" in out
    assert_same_losses(workdir, alone)


@pytest.mark.long
def test_a_stuck_process_is_told_from_a_slow_one(two_processes, tmp_path):
    workdir = tmp_path / "run"
    # How long a start takes here, which counts as no progress; that run compiled these programs.
    [start] = values(two_processes("resident"), "train/startup_seconds").values()
    timeout = min(round(10 + 2 * start), HEARTBEAT_SECONDS // 2)
    argv = flags(workdir, train__step_timeout=timeout, train__steps=100_000)
    with local_multihost("2", *argv) as script:
        wait_for_step(workdir, script, 5)
        stuck = members(script)[1]
        stuck.suspend()
        out = finish(script, code=75)
        assert not stuck.is_running()
    assert re.search(
        rf"error: no progress for {timeout} s \(train.step_timeout\) after step \d+", out
    )
    log = (workdir / "logs" / "process_000.log").read_text()
    # Every thread's stack, and where the loop waits.
    assert "most recent call first" in log and re.search(r"loop.py.* in (drain|run)", log)


def test_one_process_with_another_config(tmp_path):
    argv = flags(tmp_path / "run")
    with contextlib.ExitStack() as stack:
        both = [
            stack.enter_context(p) for p in gang(PROGRAM, argv, [*argv, "--config.train.seed=7"])
        ]
        for index, process in enumerate(both):
            out = finish(process, code=1)
            assert (
                f"error: process {index}: process 1 differs from process 0 in config.train.seed: "
                "7, not 0; start all processes with the same command" in out
            )
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_folder_that_the_others_do_not_see(tmp_path):
    own = [flags(tmp_path / f"disk_{index}") for index in range(2)]
    # Local disks show at once what is there.
    impatient = "from stem_jax.processes import agreement; agreement._FOLDER_SECONDS = 1"
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(p) for p in gang(PROGRAM, *own, changes=impatient)]
        for process in both:
            out = finish(process, code=1)
            assert f"--workdir={tmp_path / 'disk_1'} on host" in out
            assert "is another folder than on host" in out and "such as NFS" in out


def test_processes_that_do_not_divide_the_batch(tmp_path):
    with local_multihost("2", "--devices=3", *flags(tmp_path / "run")) as script:
        out = finish(script, code=1)
    why = "train.global_batch_size=8 .* do not divide over the 6 devices"
    for index in range(2):
        assert re.search(f"error: process {index}: {why}", out)


def test_a_disk_that_one_process_cannot_write(tmp_path):
    (tmp_path / "disk" / "table").mkdir(parents=True)
    (tmp_path / "disk" / "table" / "process-1").touch()
    keys = {"resident_rows": 256, "host_rows": 64, "disk": tmp_path / "disk"}
    own = flags(tmp_path / "run", **{f"tables__{key}": value for key, value in keys.items()})
    with local_multihost("2", *own) as script:
        out = finish(script, code=1)
    why = "tables.disk: .*/table/process-1/.* cannot be written"
    assert re.search(f"error: process 0: process 1: {why}", out)
    assert re.search(f"error: process 1: {why}", out)
    assert "Traceback" not in out


@pytest.mark.parametrize("index", [0, 1])
def test_a_coordinator_that_nobody_reaches(tmp_path, index):
    where = [f"--coordinator=localhost:{free_port()}", "--num-processes=2", "--init-timeout=2"]
    argv = ["--multihost", *where, f"--process-index={index}", *flags(tmp_path)]
    with child("-m", "stem_jax.train", *argv) as process:
        out = finish(process, code=75)
    assert re.search(rf"error: process {index} on .* waited 2 s at localhost:\d+", out)
    assert "start all 2 processes" in out and "--init-timeout" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--coordinator=localhost"], "--coordinator=localhost has no port; give HOST:PORT"),
        (["--coordinator=localhost:99999"], "--coordinator=localhost:99999 has no port; give HOST"),
        (["--coordinator=localhost:1"], "--coordinator=localhost:1 needs --num-processes=N and"),
        (["--init-timeout=0"], "--init-timeout=0 must be above 0 seconds"),
        (
            ["--coordinator=a:1", "--num-processes=2", "--process-index=2"],
            r"--process-index=2 must lie in [0, 2)",
        ),
    ],
)
def test_half_an_address_is_refused(tmp_path, argv, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        train.main(["--multihost", *argv, *flags(tmp_path)])


def test_no_cluster_is_refused(tmp_path):
    with child("-m", "stem_jax.train", "--multihost", *flags(tmp_path)) as process:
        assert "error: no cluster was detected" in finish(process, code=1)


def test_an_address_without_multihost_is_refused(tmp_path):
    with pytest.raises(InputError, match="need --multihost; without it every process would"):
        train.main(["--num-processes=2", *flags(tmp_path)])


FAILING = """
import sys
from stem_jax.processes.cluster import Gang, membership
from stem_jax.errors import InputError
with membership(Gang(sys.argv[1], 2, int(sys.argv[2]))):
    raise [OSError(5, "disk"), InputError("refused by a test")][int(sys.argv[3])]
"""


@pytest.mark.parametrize("errors", [(0, 1), (1, 1)])
def test_exit_statuses_tell_refusals_from_failures(errors):
    address = f"localhost:{free_port()}"
    with contextlib.ExitStack() as stack:
        both = [
            stack.enter_context(child("-c", FAILING, address, str(index), str(error)))
            for index, error in enumerate(errors)
        ]
        for index, (process, error) in enumerate(zip(both, errors)):
            out = finish(process, code=[70, 1][error])
            said = ["failed, or lost another one; the last checkpoint", "refused by a test"][error]
            assert f"error: process {index}" in out and said in out


STUCK = """
import sys, time
from pathlib import Path
from stem_jax.processes.watchdog import Watchdog
with Watchdog(0.5, Path(sys.argv[1])):
    time.sleep(60)
"""


@pytest.mark.parametrize("log", ["file", "full disk", "folder that hangs"])
def test_the_watchdog_ends_a_process_whose_log_cannot_be_written(tmp_path, log):
    path = tmp_path / "log"
    if log == "full disk":
        path = Path("/dev/full")
    elif log == "folder that hangs":
        # Opening it waits for a reader.
        os.mkfifo(path)
    with child("-c", STUCK, str(path)) as process:
        out = finish(process, code=75)
    assert "error: no progress for 0.5 s" in out and "most recent call first" in out
    if log == "file":
        assert "most recent call first" in path.read_text()


# With context=8 or tensor=8 both of two processes hold every sequence; with 4 processes of 2
# devices each axis of (2, 2, 1, 2) lies differently over them.
MESHES = [((8, 1, 1, 1), 1), ((2, 2, 1, 2), 2), ((1, 1, 1, 8), 1), ((1, 1, 8, 1), 2)]


@pytest.mark.long
def test_the_same_batches_on_any_number_of_processes(tiny_config, tmp_path):
    configs = []
    for shape, micro_batches in MESHES:
        configs.append(
            tiny_config(
                **{f"mesh.{axis}": size for axis, size in zip(AXES, shape, strict=True)},
                **{"train.micro_batches": micro_batches, "train.global_batch_size": 16},
                **{"data.sources": "facts", "data.tokenizer": "bytes", "model.vocab_size": 300},
                **{"eval.max_batches": 2},
            ).to_json()
        )
    found = {}
    for count in (1, 2, 4):
        port = free_port()
        with contextlib.ExitStack() as stack:
            processes = [
                stack.enter_context(
                    child(
                        *[__file__, str(tmp_path), *configs],
                        devices=8 // count,
                        JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
                        JAX_NUM_PROCESSES=str(count),
                        JAX_PROCESS_ID=str(index),
                        stderr=subprocess.DEVNULL,
                    )
                )
                for index in range(count)
            ]
            lines = [re.findall(r"^batch (.*)$", finish(p), re.MULTILINE) for p in processes]
        found[count] = lines[0]
    # Training batches and validation batches of each mesh.
    assert len(found[1]) == len(MESHES) * (6 + 2)
    assert found[2] == found[1] and found[4] == found[1]
    # The rows are those of the loader, whatever the mesh.
    by_mesh = [found[1][i : i + 8] for i in range(0, len(found[1]), 8)]
    assert all(digests == by_mesh[0] for digests in by_mesh)
    assert len(set(by_mesh[0])) == 8


def _digest_batches(folder: Path, texts: list[str]) -> None:
    join(Gang.from_environment())
    for text in texts:
        config = config_from_json(text)
        mesh = make_mesh(config.mesh)
        step = TrainStep(config, mesh)
        shards = axis_size(mesh, BATCH_AXES)
        share = Share.of_devices(own_batch_shards(mesh), shards, config.train.micro_batches)
        # Each process prepares the few facts for itself.
        own = folder / f"{jax.process_count()}_{jax.process_index()}"
        data = open_run_data(config, own, share=share)
        with data.batches.iterate(3) as batches:
            placed = [step.place(next(batches)) for _ in range(6)]
        placed += [step.place(batch) for batch in data.held_out]
        for batch in placed:
            places = np.argsort(slots(config.train.seq_len, mesh.shape[CONTEXT]))
            whole = {n: _whole(x)[:, places] for n, x in vars(batch).items() if n != "keys"}
            digest = hashlib.sha256(b"".join(whole[name].tobytes() for name in sorted(whole)))
            if is_first():
                print("batch", digest.hexdigest(), flush=True)


def _whole(array: jax.Array) -> np.ndarray:
    """[B, L] of [A, B / A, L], from all processes."""
    found = np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return found.reshape(-1, found.shape[-1])


if __name__ == "__main__":
    _digest_batches(Path(sys.argv[1]), sys.argv[2:])
