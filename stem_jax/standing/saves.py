"""The checkpoints of a run, as their folder lists them."""

import contextlib
import dataclasses

from stem_jax.bucket import list_objects, stored_size
from stem_jax.errors import InputError
from stem_jax.files import read_json
from stem_jax.storage import Place, is_remote

_FOLDER, _ASIDE = "checkpoints", "damaged_checkpoints"
_BEST = "eval/loss"
# What makes one in a bucket whole.
_COMMITTED = "commit_success.txt"
# What lists all files of one.
_LIST, _GROWS = "files.json", "_CHECKPOINT_METADATA"


@dataclasses.dataclass(frozen=True)
class Saves:
    """Steps of checkpoints, oldest first.

    best: of the lowest validation loss, best_loss. set_aside: those that were found damaged.
    damage: what the newest lacks of its list of files, by their names and sizes; None if nothing.
    """

    steps: list[int]
    best: int | None
    best_loss: float | None
    set_aside: list[int]
    damage: str | None

    @classmethod
    def of(cls, workdir: Place) -> "Saves":
        """Those that are complete; whether the bits of their files still are, a start finds out."""
        steps = _steps(workdir / _FOLDER)
        damage = _damage(workdir / _FOLDER / str(steps[-1])) if steps else None
        losses = {}
        for step in steps:
            with contextlib.suppress(InputError):
                # There is none if nothing was validated there.
                found = read_json(workdir / _FOLDER / str(step) / "metrics" / "metrics")
                losses[step] = float(found[_BEST])
        best = min(losses, key=lambda step: losses[step], default=None)
        loss = None if best is None else losses[best]
        return cls(steps, best, loss, _steps(workdir / _ASIDE), damage)


def _steps(folder: Place) -> list[int]:
    if is_remote(folder):
        whole = (name.partition("/") for name in list_objects(folder))
        names = {step for step, _, file in whole if file == _COMMITTED}
    else:
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return sorted(int(name) for name in names if name.isdecimal())


def _damage(folder: Place) -> str | None:
    """The first file that a checkpoint lacks, or that is shorter or longer than it was."""
    try:
        listed = read_json(folder / _LIST)
    except InputError:
        # Earlier versions have none.
        return None if stored_size(folder / _LIST) is None else f"{_LIST} is not readable"
    if not isinstance(listed, dict):
        return f"{_LIST} is not readable"
    there = list_objects(folder) if is_remote(folder) else {}
    for name, facts in listed.get("files", listed).items():
        # Lists of earlier versions have sizes alone, and not that of a file that grows.
        size = facts[0] if isinstance(facts, list) else facts if name != _GROWS else None
        found = there[name].size if name in there else stored_size(folder / name)
        if found is None:
            return f"{name} is missing"
        if size is not None and found != size:
            return f"{name} has {found} bytes of {size}"
    return None
