"""Runs with most rows on disk are those with all rows on the device, whatever comes between."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.saved_state import losses, saved_arrays
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.file_list import write_list
from stem_jax.checkpoints.loading import load_run
from stem_jax.checkpoints.saved_model import open_saved_model
from stem_jax.errors import InputError
from stem_jax.tables import disk_space
from stem_jax.train import main
from tests.children import train_flags
from tests.tables.test_offload_run import SMALL, text_file  # noqa: F401

STEPS = 12
ON_DISK = {"tables.resident_rows": 256, "tables.host_rows": 64, "checkpoint.keep": 1}


@pytest.fixture
def run(text_file, tmp_path):  # noqa: F811
    """run(name, keys): trains in a folder of that name, on eight devices."""

    def train(name: str, steps: int = STEPS, **keys) -> Path:
        workdir = tmp_path / name
        small = SMALL | {"eval.every": 0, "checkpoint.every": 4}
        small |= {
            "data.sources": text_file,
            "train.steps": steps,
            "optimizer.schedule_steps": STEPS,
        }
        main(train_flags("tiny_offload", workdir, small, keys))
        return workdir

    return train


def on_disk(tmp_path, **more):
    keys = ON_DISK | {"tables.disk": tmp_path / "disk"} | more
    return {key.replace(".", "__"): value for key, value in keys.items()}


@pytest.fixture(scope="module")
def resident(text_file, tmp_path_factory):  # noqa: F811
    """The same run with all rows on the device."""
    workdir = tmp_path_factory.mktemp("resident") / "run"
    small = SMALL | {"eval.every": 0, "checkpoint.every": 4}
    small |= {"data.sources": text_file, "train.steps": STEPS, "optimizer.schedule_steps": STEPS}
    small |= {"tables.resident_rows": "None"}
    main(train_flags("tiny_offload", workdir, small, {}))
    return workdir, saved_arrays(workdir, STEPS)


def assert_same(workdir: Path, resident):
    whole, expected = resident
    found = saved_arrays(workdir, STEPS)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert losses(workdir) == losses(whole)


def test_it_is_the_resident_run(run, resident, tmp_path):
    workdir = run("run", **on_disk(tmp_path))
    assert_same(workdir, resident)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    totals = {
        key: sum(record.get(f"table/{key}", 0) for record in records)
        for key in ("rows_made", "disk_rows_read", "host_rows_read", "disk_rows_written")
    }
    assert all(total > 0 for total in totals.values()), totals
    saves = {path.stem for path in (tmp_path / "disk").glob("**/saves/*.json")}
    assert saves == {f"step-{STEPS}"}
    with pytest.raises(InputError, match="no save step-4"):
        # A checkpoint that is gone: its rows are, too.
        _changed(workdir, STEPS, "step-4")
        load_run(workdir)


def _changed(workdir: Path, step: int, save: str) -> None:
    path = workdir / "checkpoints" / str(step) / "layout" / "metadata"
    path.write_text(path.read_text().replace(f"step-{step}", save))
    write_list(workdir / "checkpoints" / str(step))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param({}, {}, id="the same"),
        pytest.param({}, {"mesh.data": 4, "mesh.tensor": 2}, id="columns"),
        pytest.param(
            {"mesh.data": 4, "mesh.tensor": 2},
            {"mesh.data": 4, "mesh.fsdp": 2, "tables.vocab_axes": "('fsdp',)"},
            id="copies",
            marks=pytest.mark.long,
        ),
    ],
)
def test_it_goes_on(run, resident, tmp_path, before, after):
    """On the same disk, partitioned anew or not; losses of other meshes differ in the last bits."""
    run("run", 8, **on_disk(tmp_path, **before))
    workdir = run("run", **on_disk(tmp_path, **after))
    if not before and not after:
        assert_same(workdir, resident)
        return
    found, expected = losses(workdir), losses(resident[0])
    assert found == pytest.approx(expected, abs=1e-5)
    folders = list((tmp_path / "disk" / "table" / "process-0").glob("rows-*"))
    # Those of the partition before are gone with its checkpoints.
    saves = [{p.name for p in (folder / "saves").glob("*.json")} for folder in folders]
    assert saves == [{f"step-{STEPS}.json"}] * len(folders), folders


@pytest.mark.parametrize("first", ["disk", "memory"])
def test_the_disk_comes_and_goes(run, resident, tmp_path, first):
    disk, memory = on_disk(tmp_path), {"tables__resident_rows": 256}
    run("run", 8, **(disk if first == "disk" else memory))
    assert_same(run("run", **(memory if first == "disk" else disk)), resident)


def test_a_folder_of_another_run_is_refused(run, tmp_path):
    run("one", 4, **on_disk(tmp_path))
    with pytest.raises(InputError, match=r"tables.disk: .* has rows of .*/one .*another folder"):
        run("two", 4, **on_disk(tmp_path))
    with pytest.raises(InputError, match=r"tables.disk: .* has rows of .*/one .*another folder"):
        # Which would lie beside the others, and drop them.
        run("two", 4, **on_disk(tmp_path, **{"mesh.data": 4, "mesh.tensor": 2}))
    # Its own, whose checkpoints are gone, it may take.
    shutil.rmtree(tmp_path / "one")
    run("one", 4, **on_disk(tmp_path))


def test_a_folder_of_another_run_is_refused_on_resume(run, resident, tmp_path):
    """Its saves have the same names; those of the run go on where the run is moved to."""
    one = run("one", 4, **on_disk(tmp_path))
    shutil.copytree(one, tmp_path / "two")
    rows = sorted((tmp_path / "disk").glob("**/data/*.rows"))
    before = [path.read_bytes() for path in rows]
    with pytest.raises(InputError, match=r"tables.disk: .* has rows of .*/one .*another folder"):
        run("two", **on_disk(tmp_path))
    assert before == [path.read_bytes() for path in rows]
    shutil.rmtree(one)
    assert_same(run("two", **on_disk(tmp_path)), resident)


def test_a_torn_index_sets_the_checkpoint_aside(run, resident, tmp_path):
    run("run", 8, **on_disk(tmp_path, **{"checkpoint.keep": 2}))
    index = sorted((tmp_path / "disk").glob("**/saves/step-8/places.npy"))[-1]
    index.write_bytes(index.read_bytes()[:-4])
    workdir = run("run", **on_disk(tmp_path, **{"checkpoint.keep": 2}))
    assert (workdir / "damaged_checkpoints" / "8").is_dir()
    assert_same(workdir, resident)


def test_a_checkpoint_that_cannot_be_written_leaves_the_rows_of_the_one_before(
    run, resident, tmp_path, monkeypatch
):
    """It has its rows on disk by then, and Orbax counts it; the one before is there alone."""
    written = Checkpointer._write_loss

    def full(self):
        if self._saving[0] == 8:
            raise OSError(errno.ENOSPC, "no space left")
        written(self)

    monkeypatch.setattr(Checkpointer, "_write_loss", full)
    with pytest.raises(InputError, match="cannot write a checkpoint"):
        run("run", **on_disk(tmp_path))
    monkeypatch.undo()
    assert_same(run("run", **on_disk(tmp_path)), resident)


def test_rows_are_read_from_the_save(run, resident, tmp_path):
    workdir = run("run", **on_disk(tmp_path))
    tokens = np.arange(40, dtype=np.int32)[None]
    blocks = []
    for folder in (workdir, resident[0]):
        loaded = load_run(folder)
        rows, index = loaded.rows["stem"].serve(tokens).block(tokens, "float32")
        blocks.append(np.asarray(rows)[:, np.asarray(index)])
        loaded.close()
    np.testing.assert_array_equal(*blocks)


def test_exports_read_the_rows_of_a_save(run, resident, tmp_path):
    workdir = run("run", **on_disk(tmp_path))
    tables = []
    for folder in (workdir, resident[0]):
        pieces = list(open_saved_model(folder).table_pieces())
        table = np.full((320, 1, 48), np.nan, np.float32)
        for ids, columns, rows in pieces:
            table[ids, :, columns] = rows
        tables.append(table)
    assert np.isfinite(tables[0]).all()
    np.testing.assert_array_equal(*tables)
    # The rows that were written are in the checkpoint, in the order in which they came.
    memory = run("run", STEPS + 1, tables__resident_rows=256)
    with pytest.raises(InputError, match=r"rows of STEM's table alone .* tables.host_rows"):
        next(open_saved_model(memory).table_pieces())


def test_a_disk_that_is_too_small_is_refused_before_the_start(run, tmp_path, monkeypatch):
    monkeypatch.setattr(disk_space, "free_bytes", lambda folder: 2**29)
    with pytest.raises(InputError, match=r"tables.disk=.*may come to 1.00 GiB.* 0.50 GiB are free"):
        run("run", **on_disk(tmp_path))
    assert not (tmp_path / "disk").exists()


@pytest.mark.parametrize("missing", ["tables.disk", "tables.resident_rows"])
def test_what_it_needs_is_named(run, tmp_path, missing):
    keys = on_disk(tmp_path, **{missing: "None"})
    with pytest.raises(InputError, match=rf"tables.host_rows=64 .* needs {missing}"):
        run("run", **keys)
