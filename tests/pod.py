"""launch/tpu_pod.sh, and the slice of a stand-in gcloud: folders and processes here."""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.children import ROOT
from tests.launching import STAND_INS, kill_if, notes, wait_until

SCRIPT = ROOT / "launch" / "tpu_pod.sh"
WHERE = ["--name=pod", "--zone=zone-a"]
# The stand-in for the trainer writes nothing there.
WORKDIR = "--workdir=/shared/run"
SHAPE = ["--type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]


class Pod:
    """The script, the stand-in's memory, and the folder that the workers share."""

    def __init__(self, folder: Path):
        self.started = contextlib.ExitStack()
        self.state = folder / "gcloud"
        self.shared = folder / "shared"
        self.plan = self.shared / "plan.json"
        self.environment = os.environ | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "GCLOUD_STATE": str(self.state),
            "GCLOUD_PYTHON": str(folder / "python"),
            "STEM_TPU_POLL": "0.1",
            "STEM_TPU_GRACE": "1",
        }
        for path in (self.state, self.shared, folder / "bin"):
            path.mkdir()
        (folder / "bin" / "gcloud").symlink_to(STAND_INS / "gcloud.py")
        # Whatever module it is asked for, it runs the stand-in.
        trainer = [sys.executable, str(STAND_INS / "trainer.py")]
        (folder / "python").write_text(f'#!/bin/sh\nexec {shlex.join(trainer)} "$@"\n')
        (folder / "python").chmod(0o755)

    def start(self, command: str, *flags: str, **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [SCRIPT, command, *WHERE, *flags],
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self.started.enter_context(process)

    def run(self, command: str, *flags: str, code: int = 0, **environment: str) -> tuple[str, str]:
        """What it printed to stdout and stderr."""
        return finish(self.start(command, *flags, **environment), code)

    def train(self, plan: dict[str, list], *flags: str, code: int = 0) -> tuple[str, str]:
        """Trains with the stand-in trainer; plan: what each start does, by process."""
        return finish(self.start_training(plan, *flags), code)

    def start_training(self, plan: dict[str, list], *flags: str) -> subprocess.Popen:
        self.plan.write_text(json.dumps(plan))
        return self.start("train", *SHAPE, *flags, "--", f"--plan={self.plan}", WORKDIR)

    def starts(self) -> list[dict]:
        """The starts of the trainer."""
        return notes(Path(f"{self.plan}.started"))

    def calls(self) -> list[list[str]]:
        return notes(self.state / "calls.jsonl")

    def called(self, *words: str) -> list[list[str]]:
        return [call for call in self.calls() if call[2 : 2 + len(words)] == list(words)]

    def change(self, name: str = "pod", **facts) -> None:
        """What the cloud knows of a queued resource."""
        path = self.state / "resources" / f"{name}.json"
        changed = path.with_suffix(".new")
        changed.write_text(json.dumps(json.loads(path.read_text()) | facts))
        changed.rename(path)

    def preempt(self, name: str = "pod", workers: tuple[str, ...] = ("",)) -> None:
        """Takes the machines, with all processes, as the cloud does."""
        self.change(name, states=["SUSPENDED"])
        for number in workers:
            self.kill(number)

    def kill(self, number: str = "") -> None:
        """Kills what runs on one worker, or on all."""
        home = str(self.state / "workers" / number)
        kill_if(lambda process: process.cwd().startswith(home))

    def end(self) -> None:
        """Kills what is left of scripts and workers."""
        kill_if(lambda process: process.environ().get("GCLOUD_STATE") == str(self.state))
        self.kill()

    def wait_for_starts(self, number: int) -> None:
        wait_until(lambda: len(self.starts()) >= number)


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, (out + err)[-5000:]
    return out, err


@pytest.fixture
def pod(tmp_path):
    """No slice yet."""
    pod = Pod(tmp_path)
    with pod.started:
        yield pod
        pod.end()


@pytest.fixture(scope="session")
def workers_with_code(tmp_path_factory):
    """The folder of workers on which `setup` has put the code."""
    pod = Pod(tmp_path_factory.mktemp("workers"))
    with pod.started:
        pod.run("create", *SHAPE)
        pod.run("setup")
        yield pod.state / "workers"


@pytest.fixture
def ready(pod, workers_with_code):
    """A slice with the code on it. Packing and unpacking it each time costs seconds."""
    pod.run("create", *SHAPE)
    shutil.copytree(workers_with_code, pod.state / "workers", symlinks=True, dirs_exist_ok=True)
    return pod
