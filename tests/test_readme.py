"""README and manuals: their commands, run as they stand but shortened, and what they name."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from configs.base import get_config as base_config
from stem_jax import cli
from tests import effort

ROOT = Path(__file__).parent.parent
# The README first: manuals go on with its runs.
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = "train generate prepare plan export import_torch evaluate edit analyze status".split()
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


def _bash_lines(documents: list[Path]) -> list[str]:
    """Lines of bash blocks, each once, continued lines as one."""
    blocks = [
        block
        for path in documents
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL)
    ]
    whole = [re.sub(r"\\\n\s*", "", block) for block in blocks]
    return list(dict.fromkeys(line for block in whole for line in block.splitlines()))


def readme_commands() -> list[str]:
    """Commands of README and manuals that need nothing but this repository."""
    lines = [line.rpartition("&& ")[2] for line in _bash_lines(DOCUMENTS)]
    return [
        line
        for line in dict.fromkeys(lines)
        # DIR stands for what a reader has and this machine has not, as it has no accelerators'
        # compilers.
        if line.startswith("python -m stem_jax")
        and "DIR" not in line
        and not re.search("--topology=(?!cpu)", line)
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
    assert {f"stem_jax.{name}" for name in PROGRAMS} == modules


@pytest.mark.long
@pytest.mark.little_effort
def test_the_readme_runs(folder):
    for line in readme_commands():
        argv = [sys.executable, *shlex.split(line)[1:]]
        if "stem_jax.train" in line:
            argv += [f"--config.{key}={value}" for key, value in SHORT.items()]
        if "stem_jax.plan" in line:
            argv += [f"--config.{key}={value}" for key, value in SHORT.items()]
            argv += ["--config.train.global_batch_size=8"]
        if "--perplexity" in line:
            argv += ["--limit=9"]
        done = subprocess.run(
            argv,
            cwd=folder,
            # A plan makes its own devices.
            env=os.environ | {"XLA_FLAGS": "" if "stem_jax.plan" in line else effort.flags(1)},
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
    [command] = [line for line in _bash_lines(DOCUMENTS[:1]) if "pytest" in line]
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-1] == "python -m pytest --long -m long"
    assert lines[-2] == command.replace("pip install", "pip install --quiet")
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    assert f"`{command}`" in contributing and f"`{lines[-1]}`" in contributing


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def _anchors(path: Path) -> set[str]:
    """Of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{path.name}: {link}"
        assert not anchor or anchor in _anchors(target), f"{path.name}: {link}"


def test_the_readme_leads_to_every_manual():
    readme = DOCUMENTS[0].read_text()
    for path in DOCUMENTS[1:]:
        assert f"](docs/{path.name})" in readme, path.name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_keys_that_documents_name_exist(path):
    """`train.steps` in backticks, and flags such as --config.train.steps."""
    config = base_config()
    for section, key in re.findall(r"(?:`|--config\.)([a-z]+)\.([a-z_0-9]+)\b", path.read_text()):
        file = (ROOT / "configs" / f"{section}.{key}").exists()
        if section in config and not file and key != "md":
            assert key in config[section], f"{path.name}: {section}.{key}"


class _ParsedError(Exception):
    """The program would begin now."""


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_programs_take_the_flags_that_documents_give_them(path, monkeypatch, capsys):
    """Also of commands that cannot run here."""
    parse_args = cli.Parser.parse_args

    def parse(parser, argv):
        parse_args(parser, argv)
        raise _ParsedError

    monkeypatch.setattr(cli.Parser, "parse_args", parse)
    for line in _bash_lines([path]):
        command = re.search(r"(?:^|&& )python -m stem_jax\.(\w+) (.*)", line)
        if command is None:
            continue
        main = importlib.import_module(f"stem_jax.{command[1]}").main
        try:
            main(shlex.split(command[2]))
        except _ParsedError:
            continue
        except SystemExit:
            pytest.fail(f"{line}\n{capsys.readouterr().err}")
        pytest.fail(f"not parsed: {line}")
