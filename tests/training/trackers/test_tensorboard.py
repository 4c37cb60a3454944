"""TensorBoard's files of a run, and what a start need not wait for."""

import subprocess
import sys
import time

import numpy as np
import pytest

from stem_jax.training.metrics import draw_loss
from stem_jax.training.trackers import tensorboard
from stem_jax.training.trackers.tensorboard import TensorBoard
from stem_jax.training.trackers.tracker import Ending, Page, Row
from tests.tracker_files import tensorboard_events, tensorboard_shows


def _page(workdir, start: int) -> Page:
    return Page(workdir, {}, {}, start, "project", "run", False, None, 5.0)


def _rows(*steps: int, loss: float = 1.0) -> list[Row]:
    return [Row(step, 0.0, {"train/loss": loss * step}) for step in steps]


@pytest.fixture
def other_names(monkeypatch):
    """Files are named by the second: that of a next start has another name."""
    now = time.time
    starts = iter(range(0, 10_000, 10))
    begin = TensorBoard.begin

    def later(board):
        shift = next(starts)
        monkeypatch.setattr(time, "time", lambda: now() + shift)
        return begin(board)

    monkeypatch.setattr(TensorBoard, "begin", later)


def test_scalars_stand_at_their_steps(tmp_path):
    board = TensorBoard(_page(tmp_path, 0))
    assert board.begin() == 0
    for step in (1, 2):
        board.write([Row(step, 5.0, {"train/loss": step / 2, "eval/loss": 7})])
        # On the disk by now.
        last = tensorboard_events(tmp_path / "tensorboard")[-1]
        values = [(value.tag, value.simple_value) for value in last.summary.value]
        assert (last.step, last.wall_time) == (step, 5.0)
        assert values == [("train/loss", step / 2), ("eval/loss", 7)]
    board.close(Ending.COMPLETE)


def test_steps_made_again_come_in_place_of_those_before(tmp_path, other_names):
    first = TensorBoard(_page(tmp_path, 0))
    first.begin()
    first.write(_rows(1, 2, 3, 4, 5))
    # Killed; the checkpoint is of step 3.
    second = TensorBoard(_page(tmp_path, 3))
    assert second.begin() == 3
    second.write(_rows(4, 5, 6, loss=2.0))
    shown = tensorboard_shows(tmp_path / "tensorboard")
    assert {step: [v.simple_value for v in values] for step, values in shown.items()} == {
        **{1: [1.0], 2: [2.0], 3: [3.0]},
        **{4: [8.0], 5: [10.0], 6: [12.0]},
    }
    # An error on the way: it goes on behind what it has, which is more than the start.
    assert second.begin() == 6
    # Killed before all steps of the checkpoint were there.
    third = TensorBoard(_page(tmp_path, 8))
    assert third.begin() == 6
    third.write(_rows(7, 8))
    for board in (first, second, third):
        board.close(Ending.FAILED)
    assert sorted(tensorboard_shows(tmp_path / "tensorboard")) == list(range(1, 9))


def test_texts_and_pictures(tmp_path):
    board = TensorBoard(_page(tmp_path, 0))
    board.begin()
    board.write(_rows(1, 2))
    board.write_text("sample", "once upon a time")
    draw_loss([{"step": 1, "train/loss": 2.0}], tmp_path / "loss.png")
    board.write_picture(tmp_path / "loss.png")
    text, picture = tensorboard_shows(tmp_path / "tensorboard")[2][1:]
    assert text.metadata.plugin_data.plugin_name == "text"
    assert text.tensor.string_val == [b"once upon a time"]
    assert (picture.tag, picture.image.width, picture.image.height) == ("loss", 960, 540)
    assert picture.image.encoded_image_string == (tmp_path / "loss.png").read_bytes()
    # The tag is that of tensorboardX's own text.
    with tensorboard._without("torch"):
        from tensorboardX.summary import text as reference
    board.close(Ending.COMPLETE)
    assert text.tag == reference("sample", "").value[0].tag
    assert np.prod([dim.size for dim in text.tensor.tensor_shape.dim]) == 1


def test_a_start_imports_neither_torch_nor_matplotlib(tmp_path):
    """Each takes a second and more; tensorboardX takes torch along where it is installed."""
    program = f"""
import pathlib, sys
import stem_jax.run
from stem_jax.training.trackers.tensorboard import TensorBoard
from stem_jax.training.trackers.tracker import Page
page = Page(pathlib.Path({str(tmp_path)!r}), {{}}, {{}}, 0, "", "", False, None, 1.0)
TensorBoard(page).begin()
assert not {{"torch", "matplotlib", "wandb", "mlflow"}} & set(sys.modules), "imported"
import torch
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
