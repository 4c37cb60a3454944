"""What the newest checkpoint folders are, asked before any is read: whole, damaged, foreign."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.file_list import write_list
from stem_jax.checkpoints.files import (
    FORMAT_VERSION,
    FORMATS,
    damage,
    set_aside_damaged,
)
from stem_jax.errors import InputError
from stem_jax.training.state import init_state
from stem_jax.training.step import TrainStep

ITEMS = ["params", "opt_state", "table_rows", "table_slots", "data", "config", "layout"]


@pytest.fixture
def checkpoints(tmp_path) -> Path:
    """Two whole checkpoints, of steps 4 and 8, with lists."""
    for step in (4, 8):
        _write(tmp_path / "checkpoints" / str(step))
    return tmp_path / "checkpoints"


def _write(folder: Path, *, stem_layers=(1, 2), version: int = FORMAT_VERSION, listed=True):
    plain = {"config": {"model": {"stem_layers": stem_layers}}, "layout": {"format": version}}
    for item in ITEMS if stem_layers else [i for i in ITEMS if not i.startswith("table")]:
        (folder / item).mkdir(parents=True)
        (folder / item / "metadata").write_text(json.dumps(plain.get(item, {})))
    if listed:
        write_list(folder)


def _whole(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.iterdir())


def _empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()


def _without(*names: str):
    def cut(folder: Path) -> None:
        for name in names:
            (folder / name / "metadata").unlink()
            (folder / name).rmdir()
        (folder / "files.json").unlink()

    return cut


def _with_an_empty_item(folder: Path) -> None:
    (folder / "files.json").unlink()
    (folder / "params" / "metadata").unlink()


def _cut(folder: Path) -> None:
    os.truncate(folder / "params" / "metadata", 1)


DAMAGES = {
    "empty": (_empty, "without files.json and any item"),
    "lacks an item": (_without("opt_state"), "without files.json and opt_state"),
    "lacks its tables": (_without("table_rows"), "without files.json and table_rows"),
    "lacks its configuration": (_without("config", "data"), "without files.json and data, config"),
    "an item is empty": (_with_an_empty_item, "without files.json and params"),
    "cut": (_cut, "params/metadata has 1 bytes of 2"),
    "list cut": (lambda folder: os.truncate(folder / "files.json", 9), "files.json is not readabl"),
    "list is a list": (lambda folder: (folder / "files.json").write_text("[]"), "not readable"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_newest_is_set_aside_and_the_one_before_is_used(checkpoints, kind):
    spoil, reason = DAMAGES[kind]
    spoil(checkpoints / "8")
    [line] = set_aside_damaged(checkpoints)
    assert line.startswith("checkpoint 8 is damaged (") and reason in line
    assert line.endswith(f"; moved to {checkpoints.parent / 'damaged_checkpoints' / '8'}")
    assert _whole(checkpoints) == ["4"]
    assert _whole(checkpoints.parent / "damaged_checkpoints") == ["8"]


@pytest.mark.parametrize("stem_layers", [[1, 2], []])
def test_one_without_a_list_is_read_if_its_items_are_there(tmp_path, stem_layers):
    """Earlier versions wrote no list."""
    folder = tmp_path / "checkpoints" / "12"
    _write(folder, stem_layers=stem_layers, listed=False)
    assert damage(folder) is None
    assert set_aside_damaged(tmp_path / "checkpoints") == []


def _save(workdir: Path, step: TrainStep, losses: dict[int, float | None]) -> list[int]:
    """Saves with a start of their own; which steps are left."""
    state = init_state(step.blueprint)
    with Checkpointer(workdir, keep=2) as checkpoints:
        for number, loss in losses.items():
            info = CheckpointInfo(number, number, 0, {}, "none", {}, step.config)
            checkpoints.save(state, info, loss)
            checkpoints.wait()
        return checkpoints.steps()


def test_the_items_are_those_that_are_saved(train_step, tmp_path):
    _save(tmp_path, train_step((1, 1, 1)), {3: None})
    folder = tmp_path / "checkpoints" / "3"
    assert damage(folder) is None
    (folder / "files.json").unlink()
    assert damage(folder) is None
    shutil.rmtree(folder / "table_slots")
    assert damage(folder) == "without files.json and table_slots"


def test_the_best_is_known_to_the_next_start(train_step, tmp_path):
    step = train_step((1, 1, 1))
    assert _save(tmp_path, step, {1: 3.0, 2: 1.0, 3: None}) == [2, 3]
    with Checkpointer(tmp_path) as checkpoints:
        # The validation of step 3 came after its save, and does not make it the best.
        checkpoints.add_eval_loss(3, 2.0)
    assert _save(tmp_path, step, {4: None, 5: 4.0}) == [2, 4, 5]
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.add_eval_loss(4, 0.5)
    assert _save(tmp_path, step, {6: 0.75, 7: None}) == [4, 6, 7]
    assert damage(tmp_path / "checkpoints" / "4") is None


@pytest.mark.parametrize("spoil", [None, _without("opt_state"), _without("params", "table_rows")])
@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99])
def test_a_newer_format_is_refused_and_stays(checkpoints, version, spoil):
    """Its items may have other names, and its list another form."""
    newest = checkpoints / "12"
    _write(newest, version=version)
    if spoil is not None:
        spoil(newest)
    before = sorted(newest.rglob("*"))
    known = " and ".join(map(str, FORMATS))
    why = f"checkpoint {newest} has format {version}, this version reads {known}"
    with pytest.raises(InputError, match=re.escape(why)):
        set_aside_damaged(checkpoints)
    assert sorted(newest.rglob("*")) == before
    reader = Checkpointer(checkpoints.parent, read_only=True)
    with reader, pytest.raises(InputError, match=re.escape(why)):
        reader.info(12)
    # Nor are damaged ones that lie above it.
    (checkpoints / "13").mkdir()
    with pytest.raises(InputError, match=re.escape(why)):
        set_aside_damaged(checkpoints)
    assert (checkpoints / "13").is_dir()


def test_no_whole_one_is_refused(checkpoints):
    for step in ("4", "8"):
        _empty(checkpoints / step)
    with pytest.raises(InputError, match=r"is whole \(the newest, 8: without files.json and any"):
        set_aside_damaged(checkpoints)
    assert _whole(checkpoints) == ["4", "8"]


def _across_file_systems(monkeypatch):
    rename = Path.rename

    def refuse(self, target):
        if self.parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)


def test_setting_aside_works_across_file_systems(checkpoints, monkeypatch):
    _across_file_systems(monkeypatch)
    _cut(checkpoints / "8")
    files = [path.relative_to(checkpoints) for path in (checkpoints / "8").rglob("*")]
    # What an attempt before left.
    aside = checkpoints.parent / "damaged_checkpoints"
    (aside / ".8.part" / "old").mkdir(parents=True)
    (aside / "8" / "old").mkdir(parents=True)
    set_aside_damaged(checkpoints)
    assert _whole(checkpoints) == ["4"] and _whole(aside) == ["8"]
    assert sorted(path.relative_to(aside) for path in (aside / "8").rglob("*")) == sorted(files)


def test_one_that_cannot_be_moved_stays(checkpoints, monkeypatch):
    _across_file_systems(monkeypatch)
    _cut(checkpoints / "8")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copytree", full)
    why = r"8 is damaged \(.*\) and cannot be moved to .*No space left on device\); move or delete"
    with pytest.raises(InputError, match=why):
        set_aside_damaged(checkpoints)
    assert _whole(checkpoints) == ["4", "8"]
    assert _whole(checkpoints.parent / "damaged_checkpoints") == []
