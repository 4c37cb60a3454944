"""What a GPU is measured with: each item runs, none stops the others, all figures come out."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu

ROOT = Path(__file__).parent.parent


def _module(folder: Path, name: str, text: str) -> str:
    (folder / f"{name}.py").write_text(text)
    return name


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Modules that items run: one prints, one fails, one starts a process and never ends."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    texts = {
        "prints": "import json, os, sys\n"
        "print(json.dumps({'a': {'b': 2.5, 'c': 'x'}, 'list': [1],"
        " 'cache': os.environ['JAX_COMPILATION_CACHE_DIR'], 'flags': ' '.join(sys.argv[1:])}))",
        "fails": "print('{'); raise SystemExit('no such luck')",
        "waits": "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(child.pid))\n"
        "time.sleep(600)",
    }
    return {name: _module(tmp_path, name, text) for name, text in texts.items()}


def test_an_item_that_fails_or_hangs_does_not_stop_the_next(modules, tmp_path, monkeypatch, capsys):
    made = [
        gpu.Item("fails", 60, modules["fails"], ""),
        gpu.Item("waits", 3, modules["waits"], ""),
        gpu.Item("prints", 60, modules["prints"], "--flag"),
    ]
    monkeypatch.setattr(gpu, "items", lambda memory: made)
    monkeypatch.setattr(sys, "argv", ["gpu", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 1
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [outcome["status"] for outcome in found.values()] == ["failed", "out of time", "ok"]
    assert "no such luck" in capsys.readouterr().out
    # One cache for all; and the numbers as a table.
    assert found["prints"]["result"]["cache"] == str(tmp_path / "out" / "cache")
    rows = (tmp_path / "out" / "rows.md").read_text()
    assert "| prints | a.b | 2.5 |" in rows and "| prints | flags | --flag |" in rows
    # What an item started is gone with it.
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not Path(f"/proc/{child}").exists():
            break
        state = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child of a stopped item lives on")


def test_together_they_end_when_the_time_is_over(modules, tmp_path, monkeypatch):
    made = [
        gpu.Item("waits", 60, modules["waits"], ""),
        gpu.Item("prints", 60, modules["prints"], ""),
    ]
    monkeypatch.setattr(gpu, "items", lambda memory: made)
    monkeypatch.setattr(gpu, "_SECONDS", 3)
    monkeypatch.setattr(sys, "argv", ["gpu", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="1"):
        gpu.main()
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [outcome["status"] for outcome in found.values()] == ["out of time", "not begun"]


def test_every_item_has_a_small_form_and_names_are_known(monkeypatch):
    assert {item.name for item in gpu.items(80_000)} == set(gpu._TOY)
    monkeypatch.setattr(sys, "argv", ["gpu", "x", "--only=nonsense"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()


# The first of each program, or all of them.
FIRST = list({item.module: item.name for item in reversed(gpu.items(0))}.values())


@pytest.mark.long
@pytest.mark.parametrize(
    "flags", [[f"--only={','.join(FIRST)}"], pytest.param([], marks=pytest.mark.nightly)]
)
def test_a_dry_run(tmp_path, flags):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PATH": path}
    command = [
        "bash",
        str(ROOT / "benchmarks" / "gpu.sh"),
        str(tmp_path / "out"),
        "--dry-run",
        *flags,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    names = [item.name for item in gpu.items(0)]
    assert list(found) == [name for name in names if not flags or name in FIRST]
    assert found["checks"]["result"]["passed"]
    assert found["shapes_350m"]["result"]["half"]["over_dense"] > 0
    assert list((tmp_path / "out" / "profile").rglob("*.xplane.pb"))
