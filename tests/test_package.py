"""What people install: requirements and extras, console scripts, and what lies in a wheel."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from stem_jax import cli, scripts

ROOT = Path(__file__).parent.parent
PACKAGE = "stem_jax"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
SCRIPTS = PROJECT["project"]["scripts"]


def _requirements(name: str) -> list[Requirement]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-r ")]


def _extra(name: str) -> list[Requirement]:
    """What an extra asks for, those of ours that it names among it."""
    found = []
    for requirement in map(Requirement, EXTRAS[name]):
        ours = requirement.name == PACKAGE
        found += [r for e in requirement.extras for r in _extra(e)] if ours else [requirement]
    return found


# --- Requirements ---


def test_the_development_extra_is_the_requirements_file():
    assert {str(r) for r in _extra("dev")} == {
        str(r) for r in _requirements("requirements-dev.txt")
    }


@pytest.mark.parametrize("name", sorted(set(EXTRAS) - {"dev"}))
def test_what_an_extra_asks_for_is_what_the_tests_run_with(name):
    files = _requirements("requirements.txt") + _requirements("requirements-dev.txt")
    for asked in _extra(name):
        found = [r.specifier for r in files if r.name == asked.name]
        pinned = {s.version for f in found for s in f if s.operator == "=="}
        assert asked.specifier in found or any(map(asked.specifier.contains, pinned)), asked


def test_extras_are_those_that_the_documents_name():
    assert set(EXTRAS) == {
        *("tpu", "cuda", "export", "chat", "eval", "serve", "study", "s3", "gs"),
        *("wandb", "mlflow", "dev"),
    }


# --- Console scripts ---


def test_every_program_has_a_script():
    programs = {
        path.stem
        for path in (ROOT / PACKAGE).glob("*.py")
        if 'if __name__ == "__main__"' in path.read_text()
    }
    # A program with a package of its own name is that package's.
    packages = {path.parent.name for path in (ROOT / PACKAGE).glob("*/__main__.py")}
    programs |= packages
    expected = {f"stem-{p.replace('_', '-')}": f"{PACKAGE}.scripts:{p}" for p in programs}
    assert expected == SCRIPTS
    for place in SCRIPTS.values():
        name = place.partition(":")[2]
        assert callable(getattr(scripts, name))
        module = f"{PACKAGE}.{name}" + ".__main__" * (name in packages)
        assert callable(importlib.import_module(module).main)


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--help"], 0, "usage: stem-train [-h]"),
        (["--no-such-flag"], 2, "usage: stem-train [-h]"),
        (["--config=zzz"], 1, "error: config file zzz does not exist"),
    ],
)
def test_a_script_ends_as_its_module_does(argv, code, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/stem-train", *argv])
    with pytest.raises(SystemExit) as ended:
        scripts.train()
    printed = "".join(capsys.readouterr())
    assert (ended.value.code, printed.startswith(said)) == (code, True), printed


def test_usage_names_the_script_of_two_words(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stem-import-torch"])
    assert cli.Parser("stem_jax.import_torch", None).prog == "stem-import-torch"
    monkeypatch.setattr(sys, "argv", ["/x/stem_jax/import_torch.py"])
    assert cli.Parser("stem_jax.import_torch", None).prog == "python -m stem_jax.import_torch"


# --- The wheel ---


def test_a_wheel_holds_every_package():
    settings = PROJECT["tool"]["setuptools"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in ROOT.glob(f"{PACKAGE}/**/__init__.py")
    }
    found |= {
        ".".join((PACKAGE, *path.parent.relative_to(ROOT).parts))
        for path in ROOT.glob("configs/**/__init__.py")
    }
    assert sorted(found) == settings["packages"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that the package is installed in, as from a wheel: without a checkout."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in (PACKAGE, "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["--no-deps", "--no-build-isolation", "--no-index", "--target", site, source]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *build], check=True, timeout=300)
    return site


def _started(site: Path, folder: Path, *argv: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        argv,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_wheel_holds_licence_types_and_configs(site):
    (installed,) = metadata.distributions(name=PACKAGE, path=[str(site)])
    said = installed.metadata
    assert said["License-Expression"] == "Apache-2.0" and said["License-File"] == "LICENSE"
    assert said["Description-Content-Type"] == "text/markdown"
    files = {str(file) for file in installed.files or ()}
    assert f"{installed.name}-{installed.version}.dist-info/licenses/LICENSE" in files
    assert {f"{PACKAGE}/py.typed", f"{PACKAGE}/data/facts.tsv"} <= files
    shipped = {f"{PACKAGE}/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.py")}
    assert shipped == {f for f in files if f.startswith(f"{PACKAGE}/configs/") and f[-1] == "y"}
    # Nothing lands among the packages of others but this one.
    tops = {file.partition("/")[0] for file in files if file.endswith((".py", ".tsv"))}
    assert tops == {PACKAGE}
    requires = {str(Requirement(r)) for r in installed.requires or () if "extra ==" not in r}
    assert requires == {str(r) for r in _requirements("requirements.txt")}


READS = """
import sys
import stem_jax
from stem_jax.config_file import load_config
from stem_jax.data.facts import read_facts

print(stem_jax.__file__)
print(len(read_facts()), *(load_config(path).model.embed_dim for path in sys.argv[1:]))
"""


def test_an_installed_wheel_reads_configs_by_name_and_those_of_others(site, tmp_path):
    """A shipped one, one in a checkout with a base of its own, and one that stands alone."""
    checkout = tmp_path / "checkout" / "configs"
    checkout.mkdir(parents=True)
    (checkout / "__init__.py").touch()
    base = (ROOT / "configs" / "base.py").read_text()
    (checkout / "base.py").write_text(base.replace("embed_dim = 128", "embed_dim = 96"))
    alone = tmp_path / "mine.py"
    for path in (checkout / "small.py", alone):
        path.write_text("from configs.base import get_config\n")
    paths = ("tiny", checkout / "small.py", alone)
    done = _started(site, tmp_path, sys.executable, "-c", READS, *paths)
    where, found = done.stdout.splitlines() or (done.stderr, "")
    assert where == str(site / PACKAGE / "__init__.py")
    assert found == "195 192 96 128"


def test_an_installed_script_tells_its_usage_quickly(site, tmp_path):
    script = [sys.executable, "-X", "importtime", site / "bin" / "stem-train", "--help"]
    done = _started(site, tmp_path, *script)
    assert done.stdout.startswith("usage: stem-train [-h]"), done.stderr[-2000:]
    assert not re.search(r"\| +(jax|flax|orbax|grain|matplotlib)$", done.stderr, re.MULTILINE)


@pytest.mark.long
def test_an_installed_script_trains_a_shipped_config_elsewhere(site, tmp_path):
    keys = {
        "data.tokenizer": "bytes",
        "data.sources": "facts",
        "model.vocab_size": 512,
        "model.num_layers": 2,
        "train.steps": 2,
        "train.seq_len": 64,
        "train.sample_tokens": 2,
        "eval.baselines": False,
    }
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    done = _started(site, tmp_path, site / "bin" / "stem-train", "--config=tiny", *flags)
    assert "run complete: step 2, runs/tiny" in done.stdout, done.stderr[-2000:]
    generate = ["--workdir=runs/tiny", "--prompt=The", "--max-new-tokens=2", "--greedy"]
    done = _started(site, tmp_path, site / "bin" / "stem-generate", *generate)
    assert done.stdout.startswith("The"), done.stderr[-2000:]
