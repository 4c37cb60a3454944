"""Compiled programs between starts: where they are kept, when they are not, and how many."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks.children import environment
from stem_jax import compilation_cache
from stem_jax.compilation_cache import keep_programs

ROOT = Path(__file__).parent.parent


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """What `keep_programs` sets, with nothing in the environment; the home is empty."""
    found = {}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(jax.config, "update", lambda name, value: found.update({name: value}))
    return found


def _probed(monkeypatch, loads):
    calls = []

    def probe(folder):
        calls.append(folder)
        return loads

    monkeypatch.setattr(compilation_cache, "_loads", probe)
    return calls


def test_programs_are_kept_in_the_cache_folder_of_the_user(settings, monkeypatch, tmp_path):
    calls = _probed(monkeypatch, True)
    keep_programs()
    folder = Path(settings["jax_compilation_cache_dir"])
    assert folder.parent == tmp_path / "cache" / "stem_jax" / "programs"
    assert folder.name.startswith(f"jaxlib-{jax.lib.__version__}-") and folder.is_dir()
    assert folder.stat().st_mode & 0o077 == 0
    keep_programs()
    assert len(calls) == 1, "a folder is tried out once"


def test_another_jaxlib_or_processor_has_another_folder(monkeypatch):
    here = compilation_cache._machine()
    assert compilation_cache._machine() == here
    monkeypatch.setattr(compilation_cache.importlib.metadata, "version", lambda _: "0.0.1")
    other = compilation_cache._machine()
    monkeypatch.setattr(Path, "read_text", lambda self: "flags : sse2 none-such")
    assert len({here, other, compilation_cache._machine()}) == 3


def test_nothing_is_kept_where_an_entry_does_not_load(settings, monkeypatch):
    calls = _probed(monkeypatch, False)
    keep_programs()
    keep_programs()
    assert (settings, len(calls)) == ({}, 1)


def test_what_took_too_long_to_tell_is_tried_again(settings, monkeypatch):
    calls = _probed(monkeypatch, None)
    keep_programs()
    assert settings == {}
    keep_programs()
    assert len(calls) == 2
    _probed(monkeypatch, True)
    keep_programs()
    assert "jax_compilation_cache_dir" in settings


def test_a_probe_that_is_slow_says_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(compilation_cache, "_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(compilation_cache, "_PROBE_SECONDS", 0.1)
    assert compilation_cache._loads(tmp_path) is None


def test_nothing_is_kept_and_nothing_said_where_it_cannot_be_written(
    settings, monkeypatch, tmp_path, capfd
):
    _probed(monkeypatch, True)
    (tmp_path / "cache").write_text("in the way")
    keep_programs()
    assert (settings, *capfd.readouterr()) == ({}, "", "")


def test_what_is_said_elsewhere_wins(settings, monkeypatch, tmp_path):
    _probed(monkeypatch, True)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    keep_programs()
    assert settings == {}
    keep_programs(folder=tmp_path / "of_the_run")
    assert settings["jax_compilation_cache_dir"] == str(tmp_path / "of_the_run")
    settings.clear()
    keep_programs(enabled=False, folder=tmp_path / "of_the_run")
    assert settings == {"jax_enable_compilation_cache": False}


def test_tests_never_use_the_folder_of_the_user():
    assert "stem_jax_test_cache" in jax.config.jax_compilation_cache_dir
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == jax.config.jax_compilation_cache_dir


def test_what_was_not_used_for_longest_goes_first(monkeypatch, tmp_path):
    monkeypatch.setattr(compilation_cache, "MAX_BYTES", 250)
    for age, name in enumerate(("new", "used", "old", "older")):
        path = tmp_path / f"jaxlib-{age % 2}" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 100)
        os.utime(path, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "jaxlib-1" / "used", (2e9, 1e9 - 5))
    compilation_cache._shrink(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["new", "used"]


def test_an_entry_is_written_and_read_again(tmp_path, capfd):
    """Where entries do not load (jax#38445) the answer is no; either way no word and no file."""
    assert compilation_cache._loads(tmp_path) in (True, False)
    assert (list(tmp_path.iterdir()), *capfd.readouterr()) == ([], "", "")


@pytest.mark.parametrize("program", ["import sys; sys.exit(1)", "import os; os.abort()"])
def test_a_probe_that_fails_says_no(monkeypatch, tmp_path, program):
    monkeypatch.setattr(compilation_cache, "_PROBE", program)
    assert compilation_cache._loads(tmp_path) is False


_PROGRAM = """
from stem_jax.jax_start import start_jax
start_jax()
import jax
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.rpartition("/")[2]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jax.numpy.tanh(x @ x))(jax.numpy.ones((9, 9)))
print("hit" if "cache_hits" in hits else "miss" if "cache_misses" in hits else "off")
"""


def test_the_second_start_loads_what_the_first_compiled(tmp_path):
    environment = dict(os.environ, XDG_CACHE_HOME=str(tmp_path))
    del environment["JAX_COMPILATION_CACHE_DIR"]
    environment.pop("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    said = []
    for _ in range(2):
        argv = [sys.executable, "-c", _PROGRAM]
        options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(argv, timeout=300, **options)
        assert (done.returncode, done.stderr) == (0, "")
        said.append(done.stdout.strip())
    # Off where entries do not load.
    assert said in (["miss", "hit"], ["off", "off"])


def test_what_a_benchmark_starts_leaves_the_users_cache_alone(tmp_path):
    argv = [sys.executable, "-c", "from stem_jax.jax_start import start_jax; start_jax()"]
    told = environment(XDG_CACHE_HOME=str(tmp_path))
    told.pop("JAX_COMPILATION_CACHE_DIR", None)
    subprocess.run(argv, cwd=ROOT, env=told, check=True, timeout=300)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["editing", "end_memory", "export_memory", "needle"])
def test_benchmarks_that_start_programs_turn_it_off(name):
    text = (ROOT / "benchmarks" / f"{name}.py").read_text()
    starts = len(re.findall(r"subprocess\.run\(|Popen\(", text))
    assert starts == len(re.findall(r"environment\(", text)) > 0
