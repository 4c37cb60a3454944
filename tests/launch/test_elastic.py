"""launch/local_multihost.sh --elastic: a run that loses hosts goes on, and takes them back."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import psutil
import pytest

from stem_jax.elastic_mesh import data_size, largest
from stem_jax.errors import InputError
from tests import effort, launching
from tests.children import ROOT, child, finish, train_flags
from tests.launching import wait_until

SMALL = launching.SMALL | {
    "train.steps": 100_000,
    "optimizer.schedule_steps": 400,
    "checkpoint.every": 12,
    "checkpoint.keep": 1000,
}


def test_sizes_that_batch_and_rows_divide_over(tiny_config):
    config = tiny_config(**{"train.global_batch_size": 24, "tables.pad_multiple": 96})
    assert [data_size(config, n) for n in (1, 2, 3, 4, 5, 6, 8, 12, 16, 24)] == [
        *(1, 2, 3, 4, None, 6, 8, 12, None, 24)
    ]
    two = {"mesh.fsdp": 2, "mesh.tensor": 2, "train.micro_batches": 2}
    config = tiny_config(**{"train.global_batch_size": 24} | two)
    # Twelve sequences at a time, over data and fsdp.
    assert [data_size(config, n) for n in (2, 4, 6, 8, 12, 16, 24)] == [
        *(None, 1, None, 2, None, None, None)
    ]
    config = tiny_config(**{"train.global_batch_size": 24, "tables.pad_multiple": 96} | two)
    assert data_size(config, 12) == 3
    rows = {"tables.resident_rows": 32, "tables.pad_multiple": 96}
    config = tiny_config(**{"train.global_batch_size": 24} | rows)
    assert [data_size(config, n) for n in (2, 3, 4)] == [2, None, 4]
    assert largest(config, 4, 2) == (4, 8) and largest(config, 3, 2) == (2, 4)
    assert largest(config, 3, 5) == (0, 0) and largest(config, 0, 1) == (0, 0)
    with pytest.raises(InputError, match=r"mesh\.fsdp=-1 takes .*; set mesh\.fsdp to its number"):
        data_size(tiny_config(**{"mesh.fsdp": -1, "mesh.data": 1}), 4)


class Elastic:
    """The script on four hosts of two devices; a host is down while its file is there."""

    def __init__(self, folder: Path):
        self.folder, self.workdir = folder, folder / "run"
        self.said = folder / "said"
        argv = [str(ROOT / "launch" / "local_multihost.sh"), "4", "--devices=2", "--elastic"]
        argv += [f"--probe=test ! -e {folder}/down-$HOST"]
        argv += train_flags("tiny", self.workdir, SMALL, {})
        settings = {
            "XLA_FLAGS": effort.flags(),
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "GRACE_SECONDS": "2",
            "POLL_SECONDS": "0.5",
            "PYTHON": sys.executable,
        }
        with self.said.open("w") as out:
            self.process = subprocess.Popen(
                argv, cwd=ROOT, env=os.environ | settings, stdout=out, stderr=out
            )

    def hosts(self) -> dict[int, psutil.Process]:
        """The training processes, by host."""
        found = {}
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.process.pid).children():
                if "--multihost" in process.cmdline():
                    found[int(process.environ()["HOST"])] = process
        return found

    def lose(self, *hosts: int) -> None:
        running = self.hosts()
        for host in hosts:
            (self.folder / f"down-{host}").touch()
            running[host].kill()

    def losses(self) -> dict[int, float]:
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}

    def wait_for(self, pattern: str, number: int = 1) -> list[str]:
        """Waits until it has said so, so many times."""

        def found() -> list[str]:
            return re.findall(pattern, self.said.read_text())

        wait_until(lambda: len(found()) >= number or self.process.poll() is not None, seconds=400)
        assert len(found()) >= number, self.said.read_text()[-5000:]
        return found()

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: max(self.losses(), default=0) >= step, seconds=400)

    def end(self) -> None:
        for process in self.hosts().values():
            process.kill()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def elastic(tmp_path):
    run = Elastic(tmp_path)
    yield run
    run.end()


def _continued(run: Elastic, step: int, number: int, folder: Path) -> dict[int, float]:
    """Losses of a run of full size that goes on from a checkpoint."""
    ignored = [p.name for p in (run.workdir / "checkpoints").iterdir() if p.name != str(step)]
    shutil.copytree(
        run.workdir, folder, ignore=lambda at, names: ignored if at.endswith("checkpoints") else []
    )
    keys = SMALL | {"train.steps": step + number}
    with child(
        "-m", "stem_jax.train", *train_flags("tiny", folder, keys, {}), devices=8
    ) as process:
        assert f"resuming from step {step}" in finish(process)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["train/loss"] for r in lines if step < r["step"] and "train/loss" in r}


@pytest.mark.long
@pytest.mark.little_effort
def test_down_and_up(elastic, tmp_path):
    """Two of four hosts are lost, the other two go on, and all four when they answer again."""
    wait_until(lambda: (elastic.workdir / "checkpoints" / "12").exists(), seconds=400)
    elastic.lose(1, 3)
    elastic.wait_for("elastic: starting on hosts 0, 2 with mesh.data=4")
    (down,) = map(int, elastic.wait_for(r"resuming from step (\d+)"))
    elastic.wait_for_step(down + 20)
    assert sorted(elastic.hosts()) == [0, 2]
    for host in (1, 3):
        (tmp_path / f"down-{host}").unlink()
    elastic.wait_for("elastic: 4 hosts answer; the next save is the last of this size")
    elastic.wait_for("starting on hosts 0, 1, 2, 3 with mesh.data=8", 2)
    up = int(elastic.wait_for(r"resuming from step (\d+)", 2)[1])
    elastic.wait_for_step(up + 20)
    elastic.process.send_signal(signal.SIGTERM)
    assert elastic.process.wait(120) == 0
    losses = elastic.losses()
    assert sorted(losses) == list(range(1, max(losses) + 1))
    for step in (down, up):
        expected = _continued(elastic, step, 20, tmp_path / f"from-{step}")
        assert len(expected) == 20
        for number, loss in expected.items():
            assert losses[number] == pytest.approx(loss, abs=1e-5), (step, number)
    said = elastic.said.read_text()
    assert f"stopped at step {up}" in said and "mesh         data 4" in said


@pytest.mark.long
@pytest.mark.little_effort
def test_refused_input_ends_it(tmp_path):
    argv = [str(ROOT / "launch" / "local_multihost.sh"), "2", "--devices=2", "--elastic"]
    flags = train_flags("tiny", tmp_path / "run", SMALL | {"tracking.trackers": "nowhere"}, {})
    done = subprocess.run(
        [*argv, *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "GRACE_SECONDS": "2"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and done.stderr.count("elastic: starting on hosts") == 1
    assert "there is no nowhere" in done.stderr
