"""The files of a checkpoint: a list written with it, and what is missing later.

Values on disk carry no checksums that would tell a truncated file from a whole one before it is
read, and reading is too late: by then other processes wait for this one.
"""

import json
import shutil
from pathlib import Path

from stem_jax.errors import InputError

LIST = "files.json"
ASIDE = "damaged_checkpoints"
# Orbax adds the time of the commit to it afterwards.
_GROWS = "_CHECKPOINT_METADATA"


def write_list(folder: Path) -> None:
    """Writes the names and sizes of all files of a checkpoint beside them."""
    sizes = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / LIST).write_text(json.dumps(sizes, indent=0))


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if nothing is, or if it has no list."""
    try:
        sizes = json.loads((folder / LIST).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return f"{LIST} is not readable"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if name != _GROWS and path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    return None


def set_aside_damaged(checkpoints: Path) -> list[str]:
    """Moves damaged checkpoints that are newer than the newest whole one out of the way.

    Returns a line for each. Raises InputError if no whole one is left.
    """
    steps = sorted(
        (int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal()), reverse=True
    )
    found: list[tuple[int, str]] = []
    for step in steps:
        reason = damage(checkpoints / str(step))
        if reason is None:
            break
        found.append((step, reason))
    if found and len(found) == len(steps):
        raise InputError(
            f"no checkpoint in {checkpoints} is whole (the newest, {found[0][0]}: {found[0][1]}); "
            "bring its files back, or start in another --workdir"
        )
    aside = checkpoints.parent / ASIDE
    lines = []
    for step, reason in found:
        aside.mkdir(exist_ok=True)
        target = aside / str(step)
        if target.exists():
            shutil.rmtree(target)
        (checkpoints / str(step)).rename(target)
        lines.append(f"checkpoint {step} is damaged ({reason}); moved to {target}")
    return lines
