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
from stem_jax.checkpoints.chain import saved_bases
from stem_jax.checkpoints.items import table_items
from stem_jax.memory.memory import STEM

_FILLER = "filler"
# Rows on disk ask for a gibibyte before a run begins.
_DISK_MIB, _DISK_MIB_WITH_ROWS = 512, 1536
_TABLE = table_items(STEM)


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
    _flip(rng.choice([path for path in _files(run) if path.stat().st_size]), at, rng)
    return code


def flip_base(run: Run, at: Round, rng: random.Random) -> int:
    """One bit is another in a file of a save that the tables of the newest build on."""
    code = terminate(run, at, rng)
    while not (files := _files_of_bases(run)):
        run.start()
        run.wait_for(run.last_step() + 1)
        code = terminate(run, at, rng)
    _flip(rng.choice(files), at, rng)
    return code


def fill_disk(run: Run, at: Round, rng: random.Random) -> int:
    """Nothing more can be written until the processes have ended."""
    filler = run.workdir / _FILLER
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(2**16)):
            pass
    code = run.wait()
    filler.unlink()
    return code


def small_disk(folder: Path, with_rows: bool) -> None:
    """An empty folder that is a small file system of its own; one that is there stays."""
    folder.mkdir(exist_ok=True)
    # Of a campaign that was stopped while it was full.
    (folder / _FILLER).unlink(missing_ok=True)
    if not os.path.ismount(folder):
        size = f"size={_DISK_MIB_WITH_ROWS if with_rows else _DISK_MIB}m"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=True)


def remove_disk(folder: Path) -> None:
    """With all that is on it."""
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", folder], check=True)


def _files(run: Run) -> list[Path]:
    """The files of the newest checkpoint that hold its arrays and its plain part."""
    newest = _checkpoints(run)[-1]
    listed = json.loads((newest / "files.json").read_text())
    files = [newest / name for name in listed.get("files", listed) if not name.startswith("_")]
    files.append(newest / "files.json")
    if run.disk is not None:
        save = f"step-{newest.name}"
        files += [*run.disk.glob(f"**/saves/{save}.json"), *run.disk.glob(f"**/saves/{save}/*")]
    return sorted(files)


def _files_of_bases(run: Run) -> list[Path]:
    """Those that the newest checkpoint's table needs of others; none if all others need them."""
    chains = [_chain(folder) for folder in _checkpoints(run)]
    bases = chains[-1][1:]
    # Where one whole save is below all, nothing would be left without it.
    if len({chain[-1] for chain in chains}) == 1:
        return []
    files = [file for base in bases for name in _TABLE for file in (base / name).rglob("*")]
    return sorted(file for file in files if file.is_file() and file.stat().st_size)


def _chain(checkpoint: Path) -> list[Path]:
    """A checkpoint and what its table builds on, down to the whole save."""
    base = saved_bases(checkpoint).get(STEM)
    if base is None:
        return [checkpoint]
    return [checkpoint, *_chain(checkpoint.with_name(f"{base.step}"))]


def _checkpoints(run: Run) -> list[Path]:
    """All that are there, oldest first."""
    folder = run.workdir / "checkpoints"
    found = [path for path in folder.iterdir() if path.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name))


def _flip(path: Path, at: Round, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    place = min(int(at.moment * len(content)), len(content) - 1)
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
