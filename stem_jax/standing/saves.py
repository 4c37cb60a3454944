"""The checkpoints of a run, as their folder lists them."""

import contextlib
import dataclasses

from stem_jax.bucket import list_objects
from stem_jax.errors import InputError
from stem_jax.files import read_json
from stem_jax.storage import Place, is_remote

_FOLDER, _ASIDE = "checkpoints", "damaged_checkpoints"
_BEST = "eval/loss"
# What makes one in a bucket whole.
_COMMITTED = "commit_success.txt"


@dataclasses.dataclass(frozen=True)
class Saves:
    """Steps of checkpoints, oldest first.

    best: of the lowest validation loss, best_loss. set_aside: those that were found damaged.
    """

    steps: list[int]
    best: int | None
    best_loss: float | None
    set_aside: list[int]

    @classmethod
    def of(cls, workdir: Place) -> "Saves":
        """Those that are complete; whether their files still are, a start finds out."""
        steps = _steps(workdir / _FOLDER)
        losses = {}
        for step in steps:
            with contextlib.suppress(InputError):
                # There is none if nothing was validated there.
                found = read_json(workdir / _FOLDER / str(step) / "metrics" / "metrics")
                losses[step] = float(found[_BEST])
        best = min(losses, key=lambda step: losses[step], default=None)
        loss = None if best is None else losses[best]
        return cls(steps, best, loss, _steps(workdir / _ASIDE))


def _steps(folder: Place) -> list[int]:
    if is_remote(folder):
        whole = (name.partition("/") for name in list_objects(folder))
        names = {step for step, _, file in whole if file == _COMMITTED}
    else:
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return sorted(int(name) for name in names if name.isdecimal())
