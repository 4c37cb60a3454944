"""Whose folders launchers work in: setup deletes its own files, paths are the caller's."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.children import ROOT

SETUP = """
source "$1"
worker_index() { echo 0; }
shift
worker_setup "$@"
"""


class Worker:
    """The home folder of a worker, and what setup sends to it."""

    def __init__(self, home: Path):
        self.home = home
        self.code = home / "stem_jax" / "code"
        python = home / "stem_jax" / "venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text("#!/bin/sh\n")
        python.chmod(0o755)

    def send(self, *names: str) -> None:
        with tarfile.open(self.home / "stem_jax_code.tar.gz", "w:gz") as archive:
            for name in names:
                path = self.home / "sent" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("jax>=1\n" if name == "requirements.txt" else name)
                archive.add(path, name)

    def setup(self, repository: str = "") -> str:
        """Returns what it said on stderr."""
        argv = ["bash", "-c", SETUP, "bash", str(ROOT / "launch" / "tpu_worker.sh")]
        argv += ["stem_jax", repository, "", ""]
        # As over ssh: in the home folder.
        environment = os.environ | {"HOME": str(self.home)}
        done = subprocess.run(argv, cwd=self.home, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    def files(self) -> set[str]:
        found = (path for path in self.code.rglob("*") if path.is_file())
        names = {str(path.relative_to(self.code)) for path in found}
        return {name for name in names if not name.startswith(".git/")}

    def run(self) -> None:
        """What a run with a relative work folder leaves in the folder it is started in."""
        (self.code / "runs" / "mine").mkdir(parents=True)
        (self.code / "runs" / "mine" / "weights").write_text("precious")


@pytest.fixture
def worker(tmp_path):
    return Worker(tmp_path)


@pytest.fixture
def repository(tmp_path):
    source = tmp_path / "repository"
    git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "--quiet", str(source)], check=True)
    (source / "requirements.txt").write_text("jax>=1\n")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "one"], check=True)
    return f"file://{source}"


def test_setup_replaces_its_files_and_leaves_a_run(worker):
    worker.send("requirements.txt", "stem_jax/old.py", "gone/deep/a b.py")
    worker.setup()
    worker.run()
    worker.send("requirements.txt", "stem_jax/new.py")
    worker.setup()
    assert worker.files() == {"requirements.txt", "stem_jax/new.py", "runs/mine/weights"}
    assert not (worker.code / "gone").exists()


def test_a_clone_and_a_copy_take_turns_around_a_run(worker, repository):
    worker.setup(repository)
    worker.run()
    worker.send("requirements.txt", "stem_jax/new.py")
    worker.setup()
    assert worker.files() == {"requirements.txt", "stem_jax/new.py", "runs/mine/weights"}
    worker.setup(repository)
    worker.setup(repository)
    assert worker.files() == {"requirements.txt", "runs/mine/weights"}


@pytest.mark.parametrize("clone", [False, True])
def test_what_an_earlier_version_left_is_moved_aside(worker, repository, clone):
    worker.code.mkdir(parents=True)
    (worker.code / "of_before.py").touch()
    worker.run()
    worker.send("requirements.txt")
    said = worker.setup(repository if clone else "")
    assert worker.files() == {"requirements.txt"}
    [aside] = worker.code.parent.glob("code.before-*")
    assert (aside / "runs" / "mine" / "weights").read_text() == "precious"
    note = f"worker 0: stem_jax/{aside.name} holds what was in code/ before; delete it when"
    assert note in said and "nothing in it is needed" in said
    worker.send("requirements.txt")
    assert note in worker.setup()
    shutil.rmtree(aside)
    worker.send("requirements.txt")
    assert "code.before" not in worker.setup()


def test_relative_paths_of_a_local_gang_are_the_callers(tmp_path):
    """The program is this checkout's all the same, also beside another one."""
    other = tmp_path / "stem_jax"
    other.mkdir()
    (other / "__init__.py").write_text("raise SystemExit('another checkout was imported')")
    (tmp_path / "print_cwd").write_text(
        '#!/bin/sh\nexec python -c "import os, stem_jax; '
        'print(os.getcwd(), os.path.dirname(stem_jax.__file__))"\n'
    )
    (tmp_path / "print_cwd").chmod(0o755)
    argv = [ROOT / "launch" / "local_multihost.sh", "1", "--workdir=runs/x"]
    environment = os.environ | {"PYTHON": "./print_cwd", "COORDINATOR_PORT": "1"}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(argv, timeout=120, **options)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path} {ROOT / 'stem_jax'}\n"), done.stderr
