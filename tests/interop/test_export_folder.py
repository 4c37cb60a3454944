"""The folder of an export: whole or not there, and written with little memory."""

import os
import shutil
import stat
import types

import pytest
import torch

from stem_jax import export
from stem_jax.errors import InputError
from stem_jax.training.state import init_state
from tests.children import child, finish
from tests.saved_models import SIZES, save_run

SLOW = """
import time
from stem_jax import cli, export
from stem_jax.checkpoints.saved_model import SavedModel

def slow(self, name):
    print("begun", flush=True)
    time.sleep(100)

SavedModel.param = slow
cli.run(export.main)
"""
# What a process had at most: one that exports, or one that could.
PEAK = """
import sys
from pathlib import Path
import jax
from stem_jax import export
jax.devices()
if sys.argv[1:]:
    export.main(sys.argv[1:])
status = Path("/proc/self/status").read_text()
print("peak", next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.fixture(scope="module")
def run_folder(train_step, tmp_path_factory):
    """The work folder of a STEM model."""
    step, folder = train_step(**SIZES), tmp_path_factory.mktemp("run")
    save_run(folder, step, init_state(step.blueprint))
    return folder


@pytest.mark.parametrize("kind", ["hf", "official"])
def test_sigterm_leaves_nothing(kind, run_folder, tmp_path):
    flags = [f"--workdir={run_folder}", f"--format={kind}", f"--out={tmp_path / 'out'}"]
    with child("-c", SLOW, *flags) as process:
        assert any(line == "begun\n" for line in process.stdout)
        # The folder, and the lock that says that its writer lives.
        begun = sorted(path.name for path in tmp_path.iterdir())
        assert all(name.startswith(".out.") for name in begun)
        assert [name.rpartition(".")[2] for name in begun] == ["part", "lock"]
        process.terminate()
        finish(process, 143)
    assert list(tmp_path.iterdir()) == []


def test_others_may_read_it(run_folder, tmp_path):
    before = os.umask(0o027)
    try:
        export.main([f"--workdir={run_folder}", "--format=hf", f"--out={tmp_path / 'new' / 'out'}"])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "out").stat().st_mode) == 0o750
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["hf", "official"])
def test_a_file_in_the_way(kind, run_folder, tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("file/out", "file/deep/out"):
        with pytest.raises(InputError, match=r"out cannot be created: .*/file is not a folder; "):
            export.main([f"--workdir={run_folder}", f"--format={kind}", f"--out={tmp_path / out}"])


def test_no_space_for_the_official_format(run_folder, tmp_path, monkeypatch):
    flags = [f"--workdir={run_folder}", "--format=official", f"--out={tmp_path / 'out'}"]
    usage = types.SimpleNamespace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        InputError, match=r"GiB for --out=.*out, with a temporary file, and 0\.0 Gi"
    ):
        export.main(flags)
    assert list(tmp_path.iterdir()) == []
    # Enough for what is asked, as it turns out, and no more.
    usage.free = 10**12
    export.main(flags)
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.pth"))
    model = (tmp_path / "out" / "consolidated" / "consolidated.pth").stat().st_size
    shutil.rmtree(tmp_path / "out")
    usage.free = int(0.9 * (written + model))
    with pytest.raises(InputError, match="free some, or choose another --out"):
        export.main(flags)
    usage.free = int(1.1 * (written + model))
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda value, path: save(value, "/dev/full"))
    with pytest.raises(InputError, match=r"consolidated.pth of --out=.* the disk may be full"):
        export.main(flags)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_memory_of_an_export(train_step, tmp_path):
    sizes = {"vocab_size": 24000, "embed_dim": 64, "num_layers": 2, "stem_layers": (1,)}
    sizes = {f"model.{name}": value for name, value in (sizes | {"ffn_dim": 3200}).items()}
    step = train_step(**{**SIZES, **sizes})
    table = 4 * 24000 * 3200
    save_run(tmp_path / "run", step, init_state(step.blueprint))
    flags = [f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}", "--format=hf"]
    # What lives at a time, not what the allocator keeps of freed chunks for each of many threads.
    returned = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    peaks = []
    for more in ([], flags):
        with child("-c", PEAK, *more, **returned) as process:
            peaks.append(1024 * int(finish(process).split()[-1]))
    written = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert sum(written) > table
    assert peaks[1] - peaks[0] < 1.3 * table, [peak / table for peak in peaks]
