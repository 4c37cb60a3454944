"""Reading a configuration: overrides as texts, paths among them, and the base beside a file."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stem_jax.config_file import load_config
from stem_jax.errors import InputError

ROOT = Path(__file__).parent.parent


KEPT = ["2026_11", "1.10", "true", "[1]", "'quoted'", "0x10"]


@pytest.mark.parametrize(
    ("key", "text"),
    [
        *itertools.product(["data.folder", "train.sample_prompt", "data.sources"], KEPT),
        # Of a path it is no name: see test_storage.
        ("train.sample_prompt", ""),
        ("data.sources", ""),
    ],
)
def test_a_text_key_keeps_its_text(key, text):
    config = load_config(ROOT / "configs" / "tiny.py", {key: text})
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == text


@pytest.mark.parametrize("text", ["none", "None"])
def test_none_is_none_where_that_is_a_value(text):
    overrides = {"data.folder": text, "train.sample_prompt": text}
    config = load_config(ROOT / "configs" / "tiny.py", overrides)
    assert config.data.folder is None and config.train.sample_prompt == text


@pytest.mark.parametrize(
    "key",
    [
        "data.folder",
        "data.tokenizer_path",
        "train.init_from",
        "train.continue_from",
        "train.compilation_cache",
    ],
)
def test_an_address_is_no_path(key):
    with pytest.raises(InputError, match=f"{key}=gs://b/x is an address"):
        load_config(ROOT / "configs" / "tiny.py", {key: "gs://b/x"})


def test_a_config_is_built_on_the_base_beside_it(tmp_path, monkeypatch):
    """Also where another checkout is the working directory, or its base was imported before."""
    base = (ROOT / "configs" / "base.py").read_text()
    for name, width in (("a", 64), ("b", 96)):
        folder = tmp_path / name / "configs"
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        own = base.replace("config.model.embed_dim = 128", f"config.model.embed_dim = {width}")
        assert own != base
        (folder / "base.py").write_text(own)
        (folder / "small.py").write_text("from configs.base import get_config\n")
    monkeypatch.chdir(tmp_path / "a")
    monkeypatch.syspath_prepend(str(tmp_path / "a"))
    before = sys.modules["configs.base"], list(sys.path)
    for name, width in (("b", 96), ("a", 64), ("b", 96)):
        path = tmp_path / name / "configs" / "small.py"
        assert load_config(path).model.embed_dim == width
    assert (sys.modules["configs.base"], sys.path) == before


def test_a_config_without_a_base_beside_it_takes_the_one_there_is(tmp_path):
    (tmp_path / "mine.py").write_text("from configs.base import get_config\n")
    assert load_config(tmp_path / "mine.py").model.embed_dim == 128


INSTALLED = """
import sys
import stem_jax
from stem_jax.config_file import load_config
from stem_jax.data.facts import read_facts

print(stem_jax.__file__)
print(len(read_facts()), *(load_config(path).model.embed_dim for path in sys.argv[1:]))
"""


def test_an_installed_wheel_reads_the_base_beside_a_config_too(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("stem_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md"):
        shutil.copy(ROOT / name, source)
    build = ["--no-deps", "--no-build-isolation", "--no-index", "--target", site, source]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *build], check=True, timeout=300)
    # A checkout with a base of its own, and a config that stands alone.
    checkout = tmp_path / "checkout" / "configs"
    checkout.mkdir(parents=True)
    (checkout / "__init__.py").touch()
    base = (ROOT / "configs" / "base.py").read_text()
    (checkout / "base.py").write_text(base.replace("embed_dim = 128", "embed_dim = 96"))
    alone = tmp_path / "mine.py"
    for path in (checkout / "small.py", alone):
        path.write_text("from configs.base import get_config\n")
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED, checkout / "small.py", alone],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    where, found = done.stdout.splitlines() or (done.stderr, "")
    assert where == str(site / "stem_jax" / "__init__.py")
    assert found == "195 96 128"


def test_files_that_are_no_configs_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"config file .*/no.py does not exist; see configs/"):
        load_config(tmp_path / "no.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(InputError, match=r"config file .*empty.py: AttributeError: .*get_config"):
        load_config(tmp_path / "empty.py")
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(InputError, match=r"not a Python file; its name must end in .py"):
        load_config(tmp_path / "text.txt")
