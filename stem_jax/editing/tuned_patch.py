"""The patch of a run that trained the tables of another alone (`optimizer.train=tables`).

It holds the rows that some update had, as they are now. Others have the bits that they had, because
nothing decays them; and so has the backbone, which is compared with the other run's.
"""

from pathlib import Path

import numpy as np

from stem_jax.bucket import is_folder
from stem_jax.bucket_files import opened
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.files import FOLDER, check_outside
from stem_jax.checkpoints.saved_model import SavedModel, open_saved_model
from stem_jax.editing.patch import token_memory
from stem_jax.editing.patch_file import Patch, write_tuned
from stem_jax.errors import InputError
from stem_jax.files import check_absent, check_writable
from stem_jax.local_copy import checkpoints_of
from stem_jax.memory.catalogue import table_specs
from stem_jax.memory.memory import STEM
from stem_jax.training.blueprint import ModelDef

_FLAG = "--out"
# Of a row: rows that caught up in pieces of another size differ in their last bits.
_ROUNDING = 1e-5


def export_patch(
    saved: SavedModel, out: str | Path, *, base: str | Path | None = None, memory: str = STEM
) -> Patch:
    """Writes the patch of a tuned run, for the run that it began with.

    Rows are read and written piece by piece.

    Args:
        saved: the tuned run.
        out: a file that does not exist.
        base: work folder of the other run; None: what `train.init_from` names.
        memory: whose rows are written.

    Returns:
        The patch, with an empty array of its shape for its rows.

    Raises:
        InputError: a run that trained more than rows, or whose rows decayed; no rows with an
            update; no such other run, none of its checkpoints has this backbone, or a third one
            trained rows in between.
    """
    out = Path(out)
    check_absent(out, _FLAG)
    check_outside(out, _FLAG)
    check_writable(out, _FLAG)
    of_tokens = token_memory(saved.config, memory)
    _check_tuned(saved, memory)
    ids_n = saved.updated_ids(memory)
    if not len(ids_n):
        raise InputError(f"no update of {saved.folder} had a row; train it for some steps first")
    base_folder = base or saved.config.train.init_from
    if base_folder is None:
        raise InputError(
            f"{saved.folder} did not begin with train.init_from; name the run that the patch is "
            "for by --base"
        )
    origin = _origin(saved, opened(base_folder, "train.init_from" if base is None else "--base"))
    if base is not None:
        _check_nothing_between(saved, origin, memory)
    shape = len(ids_n), len(of_tokens.layers), of_tokens.width
    # Nothing of the rows' size.
    nothing = np.broadcast_to(np.float32(0), shape)
    patch = Patch(
        name=out.name,
        ids=ids_n,
        layers=np.array(of_tokens.layers, np.int32),
        before=None,
        after=nothing,
        run=origin.fingerprint,
        tokenizer=origin.tokenizer.fingerprint,
        description=f"step {saved.info.step} of {saved.folder.parent.parent.name}",
        memory=memory,
    )
    write_tuned(out, patch, saved.table_pieces(memory, only=ids_n), _FLAG)
    return patch


def _check_tuned(saved: SavedModel, memory: str) -> None:
    config = saved.config
    if config.optimizer.train != "tables":
        raise InputError(
            f"{saved.folder} was trained with optimizer.train={config.optimizer.train}: a patch "
            "has rows alone; train with optimizer.train=tables"
        )
    for name, spec in table_specs(config).items():
        if spec.weight_decay != 0:
            key = f"{spec.section}.weight_decay"
            raise InputError(
                f"{saved.folder} was trained with {config.taken_key(key)}={spec.weight_decay:g}, "
                f"which moves every row of {name}: a patch has those alone that some update had; "
                f"train with {key}=0"
            )


def _origin(saved: SavedModel, folder: Path) -> SavedModel:
    """The newest checkpoint of a run whose backbone is that of the tuned one, bit for bit."""
    if not is_folder(checkpoints_of(folder)):
        raise InputError(
            f"{folder} has no {FOLDER} folder; name the run that {saved.folder} began with by "
            "--base"
        )
    steps = _steps(folder)
    found = _with_backbone(saved, folder, steps)
    if found is None:
        raise InputError(
            f"no checkpoint of {folder} ({', '.join(map(str, steps)) or 'there is none'}) has the "
            f"backbone of {saved.folder}; name the run that it began with by --base"
        )
    return found


def _check_nothing_between(saved: SavedModel, origin: SavedModel, memory: str) -> None:
    """Raises InputError if the run began with another that has this backbone, too.

    Rows that a run in between trained have no update here, and would be left out. Where its folder
    is gone, rows without an update tell: they have to be the origin's.
    """
    text = saved.config.train.init_from
    if text is None or not is_folder(checkpoints_of(text)):
        return _check_rows_without_update(saved, origin, memory)
    folder = opened(text, "train.init_from")
    began = _with_backbone(saved, folder, _steps(folder))
    if began is None or (began.info.step, began.config) == (origin.info.step, origin.config):
        return
    raise InputError(
        f"{saved.folder} began with {began.folder}, and a patch for {origin.folder} would leave "
        "out what was trained in between; leave --base out for a patch of the one, or train with "
        "train.init_from on the other"
    )


def _check_rows_without_update(saved: SavedModel, origin: SavedModel, memory: str) -> None:
    ids_n = np.setdiff1d(np.arange(saved.config.model.vocab_size), saved.updated_ids(memory))
    here, there = (_told(one, memory, ids_n) for one in (saved, origin))
    other = np.abs(here[0] - there[0]) > _ROUNDING * np.sqrt(there[1])
    if other.any():
        raise InputError(
            f"{int(other.sum())} rows of {saved.folder} that no update of it had are not those of "
            f"{origin.folder}: it began with another run, and a patch would leave out what was "
            "trained in between; name that run by --base, or train with train.init_from on this one"
        )


def _told(saved: SavedModel, memory: str, ids_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of rows, read piece by piece, a number that tells them apart, and their squares' sum: [n]."""
    told_n, squares_n = np.zeros(len(ids_n)), np.zeros(len(ids_n))
    for ids, columns, rows in saved.table_pieces(memory, only=ids_n):
        places = np.searchsorted(ids_n, ids)
        # Of each column the same in every checkpoint, however they are cut into pieces.
        layers, own = np.arange(rows.shape[1])[:, None], np.arange(columns.start, columns.stop)
        weights = np.cos((1e6 * layers + own) ** 2)
        told_n[places] += np.einsum("nsf,sf->n", rows, weights, dtype=np.float64)
        squares_n[places] += np.square(rows, dtype=np.float64).sum((1, 2))
    return told_n, squares_n


def _steps(folder: Path) -> list[int]:
    with Checkpointer(folder, read_only=True, alone=True) as checkpoints:
        return checkpoints.steps()


def _with_backbone(saved: SavedModel, folder: Path, steps: list[int]) -> SavedModel | None:
    """The newest of these checkpoints of another run that has the backbone of the tuned one."""
    for step in reversed(steps):
        found = open_saved_model(folder, step)
        if found.tokenizer.fingerprint == saved.tokenizer.fingerprint and _same(saved, found):
            return found
    return None


def _same(one: SavedModel, other: SavedModel) -> bool:
    here, there = (ModelDef(saved.config).shapes() for saved in (one, other))
    return here == there and all(
        np.array_equal(one.trained_param(name), other.trained_param(name)) for name in here
    )
