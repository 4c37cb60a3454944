"""Reading a configuration: overrides as texts, paths among them, and the base beside a file."""

import itertools
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
        "train.compilation_cache",
    ],
)
def test_an_address_is_no_path(key):
    with pytest.raises(InputError, match=f"{key}=gs://b/x is an address"):
        load_config(ROOT / "configs" / "tiny.py", {key: "gs://b/x"})


@pytest.mark.parametrize("key", ["train.init_from", "train.continue_from"])
def test_a_run_may_begin_with_one_in_a_bucket(key):
    config = load_config(ROOT / "configs" / "tiny.py", {key: "gs://b/x"})
    assert config.value_of(key) == "gs://b/x"
    with pytest.raises(InputError, match=f"{key}=gs:b/x is an address, which is written gs://b/x"):
        load_config(ROOT / "configs" / "tiny.py", {key: "gs:b/x"})


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


def test_a_shipped_config_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("tiny") == load_config(ROOT / "configs" / "tiny.py")
    # A name is that of a shipped one, whatever lies here.
    (tmp_path / "tiny").mkdir()
    assert load_config("tiny").model.embed_dim == 192


def test_a_name_that_is_none_is_told_those_that_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in ("tinny", "tiny.py", "configs/tiny.py", "configs/tiny"):
        said = rf"config file {given} does not exist; did you mean --config=tiny\? known by name: "
        with pytest.raises(InputError, match=said + "base, dense_1b, .*tiny, tiny_dense"):
            load_config(given)
    with pytest.raises(InputError, match=r"config file zzz does not exist; known by name: base, "):
        load_config("zzz")


def test_another_package_named_configs_is_not_the_base(tmp_path, monkeypatch):
    """One without a `base`, in the working directory and before all others on the path."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("raise RuntimeError('not this one')\n")
    mine = tmp_path / "mine" / "deep" / "er.py"
    mine.parent.mkdir(parents=True)
    mine.write_text("from configs.base import get_config\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = sys.modules["configs"]
    assert load_config(mine).model.embed_dim == load_config("tiny_dense").model.embed_dim - 64
    assert sys.modules["configs"] is before
    # With one it is: that of the project that the command is called in.
    base = (ROOT / "configs" / "base.py").read_text()
    (tmp_path / "configs" / "base.py").write_text(base.replace("embed_dim = 128", "embed_dim = 96"))
    (tmp_path / "configs" / "__init__.py").write_text("")
    assert load_config(mine).model.embed_dim == 96


def test_a_config_without_a_base_needs_no_package(tmp_path):
    """As one that makes its ConfigDict itself, or from a module beside the checkout."""
    text = (ROOT / "configs" / "base.py").read_text()
    (tmp_path / "whole.py").write_text(text.replace("embed_dim = 128", "embed_dim = 64"))
    assert load_config(tmp_path / "whole.py").model.embed_dim == 64


def test_files_that_are_no_configs_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"config file .*/no.py does not exist; known by name"):
        load_config(tmp_path / "no.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(InputError, match=r"config file .*empty.py: AttributeError: .*get_config"):
        load_config(tmp_path / "empty.py")
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(InputError, match=r"not a Python file; its name must end in .py"):
        load_config(tmp_path / "text.txt")
