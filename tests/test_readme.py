"""The README's commands, run as they stand, shortened by overrides."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHORT = {
    "model.num_layers": 2,
    "model.embed_dim": 48,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.ffn_dim": 64,
    "train.steps": 3,
    "train.global_batch_size": 2,
    # Room for five depths of a needle.
    "train.seq_len": 128,
    "eval.every": 0,
    "eval.max_batches": 2,
}


def readme_commands() -> list[str]:
    """Lines of the README's bash blocks that need nothing but this repository."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    whole = [re.sub(r"\\\n\s*", "", block) for block in blocks]
    lines = [line.rpartition("&& ")[2] for block in whole for line in block.splitlines()]
    return [
        line
        for line in lines
        # DIR and pod topologies stand for what a reader has and this machine has not.
        if line.startswith("python -m stem_jax") and "DIR" not in line and "=v" not in line
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working folder that looks like a checkout; runs/ stays out of the real one."""
    path = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "stem_jax", "benchmarks", "README.md"):
        (path / name).symlink_to(ROOT / name)
    return path


def test_the_readme_has_the_commands():
    modules = {line.split()[2] for line in readme_commands()}
    assert {"stem_jax.train", "stem_jax.generate", "stem_jax.prepare"} <= modules


@pytest.mark.long
def test_the_readme_runs(folder):
    for line in readme_commands():
        argv = [sys.executable, *shlex.split(line)[1:]]
        if "stem_jax.train" in line:
            argv += [f"--config.{key}={value}" for key, value in SHORT.items()]
        if "stem_jax.plan" in line:
            argv += [f"--config.{key}={value}" for key, value in SHORT.items()]
            argv += ["--config.train.global_batch_size=8"]
        done = subprocess.run(
            argv,
            cwd=folder,
            env=os.environ | {"XLA_FLAGS": ""},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
        assert done.stdout.strip(), line


def test_the_file_tree_is_true():
    tree = re.search(r"## File tree\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = set()
    folder = ""
    for line in tree[1].splitlines():
        # Names stand before the double space that starts the remark.
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            names.add(f"{folder}{name}" if line.startswith(" ") else name)
        if not line.startswith(" "):
            folder = line.split()[0]
    for name in names:
        assert (ROOT / name).exists(), f"{name} is in the README's tree and not here"
    shown = {name.rstrip("/") for name in names}
    for path in (ROOT / "stem_jax").iterdir():
        if path.name not in ("__pycache__", "__init__.py"):
            assert f"stem_jax/{path.name}" in shown, f"{path.name} is missing in the README's tree"


def test_ci_runs_the_readmes_test_command_and_then_the_long_tests():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [command] = [line for block in blocks for line in block.splitlines() if "pytest" in line]
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-1] == "python -m pytest --long -m long"
    assert lines[-2] == command.replace("pip install", "pip install --quiet")
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    assert f"`{command}`" in contributing and f"`{lines[-1]}`" in contributing
