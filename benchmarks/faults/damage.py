"""Faults of the disk: files of the newest checkpoint that are torn, flipped or gone; no room."""

import contextlib
import json
import os
import random
import subprocess
from pathlib import Path

from benchmarks.faults.plan import Round
from benchmarks.faults.run import Run
from benchmarks.faults.starts import terminate

# Rows on disk ask for a gibibyte before a run begins.
_DISK_MIB, _DISK_MIB_WITH_ROWS = 512, 1536


def truncate(run: Run, at: Round, rng: random.Random) -> int:
    """A file ends early."""
    code = terminate(run, at, rng)
    path = rng.choice([path for path in _files(run) if path.stat().st_size])
    os.truncate(path, int(at.moment * path.stat().st_size))
    return code


def tear(run: Run, at: Round, rng: random.Random) -> int:
    """Some files end early and one is empty, as a host that crashed leaves them."""
    code = terminate(run, at, rng)
    paths = [path for path in _files(run) if path.stat().st_size]
    for path in rng.sample(paths, min(3, len(paths))):
        os.truncate(path, int(rng.random() * path.stat().st_size))
    os.truncate(rng.choice(paths), 0)
    return code


def unlink(run: Run, at: Round, rng: random.Random) -> int:
    """A file of the tables is gone."""
    code = terminate(run, at, rng)
    rows = [path for path in _files(run) if "/table" in str(path) or "/saves/" in str(path)]
    rng.choice(rows).unlink()
    return code


def flip(run: Run, at: Round, rng: random.Random) -> int:
    """One bit of a file is another."""
    code = terminate(run, at, rng)
    path = rng.choice([path for path in _files(run) if path.stat().st_size])
    content = bytearray(path.read_bytes())
    place = min(int(at.moment * len(content)), len(content) - 1)
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return code


def fill_disk(run: Run, at: Round, rng: random.Random) -> int:
    """Nothing more can be written until the processes have ended."""
    filler = run.workdir / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(2**16)):
            pass
    code = run.wait()
    filler.unlink()
    return code


def small_disk(folder: Path, with_rows: bool) -> None:
    """An empty folder that is a small file system of its own; one that is there stays."""
    folder.mkdir(exist_ok=True)
    if not os.path.ismount(folder):
        size = f"size={_DISK_MIB_WITH_ROWS if with_rows else _DISK_MIB}m"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=True)


def remove_disk(folder: Path) -> None:
    """With all that is on it."""
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", folder], check=True)


def _files(run: Run) -> list[Path]:
    """The files of the newest checkpoint that hold its arrays and its plain part."""
    folder = run.workdir / "checkpoints"
    newest = max(
        (path for path in folder.iterdir() if path.name.isdecimal()), key=lambda p: int(p.name)
    )
    listed = json.loads((newest / "files.json").read_text())
    files = [newest / name for name in listed.get("files", listed) if not name.startswith("_")]
    if run.disk is not None:
        save = f"step-{newest.name}"
        files += [*run.disk.glob(f"**/saves/{save}.json"), *run.disk.glob(f"**/saves/{save}/*")]
    return sorted(files)
