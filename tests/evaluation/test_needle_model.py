"""The model of configs/needle.py, trained once and kept as an export, finds its needles."""

import contextlib
import json
from pathlib import Path

import pytest

from stem_jax import evaluate, import_torch
from tests.children import finish, gang
from tests.pictures import assert_is_heatmap

pytestmark = pytest.mark.little_effort

MODEL = Path(__file__).parents[1] / "data" / "needle_model"
FLAGS = ["--niah", "--keys=1,2", "--depths=0,0.5,1", "--samples=5"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("needle") / "run"
    import_torch.main(["--from=hf", f"--path={MODEL}", f"--workdir={folder}"])
    return folder


@pytest.fixture(scope="module")
def found(run_folder):
    """What one process finds."""
    evaluate.main([f"--workdir={run_folder}", *FLAGS, "--no-progress"])
    return json.loads((run_folder / "evaluation" / "niah.json").read_text())


@pytest.mark.long
def test_it_finds_over_nine_in_ten_within_its_context(found):
    assert found["context"] == 256
    assert [table["keys"] for table in found["tables"]] == [1, 2]
    for table in found["tables"]:
        assert table["lengths"][-1] == 256 and len(table["lengths"]) > 1
        assert table["mean"] > 0.9
        # It was trained on these very sentences.
        assert table["strict_mean"] > 0.9


@pytest.mark.long
def test_the_heatmap_shows_what_was_found(found, run_folder):
    path = run_folder / "evaluation" / "niah.png"
    assert_is_heatmap(path, [table["accuracy"] for table in found["tables"]])


@pytest.mark.long
def test_two_processes_find_the_same(found, run_folder, tmp_path):
    out = tmp_path / "both.json"
    flags = [f"--workdir={run_folder}", *FLAGS, f"--out={out}"]
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(p) for p in gang("stem_jax.evaluate", flags, flags)]
        said = [finish(process) for process in processes]
    assert json.loads(out.read_text()) == found
    assert "2 keys: " in said[0] and "2 keys: " not in said[1]
