"""Runs in the files of Weights & Biases, read back with its own program."""

import json
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from stem_jax.training.trackers.wandb_files import last_step
from tests.children import ROOT
from tests.tracker_files import wandb_files, wandb_history, wandb_records

# wandb changes how the interpreter ends, so it runs in processes of their own.
START = """
import os, sys, time
from pathlib import Path
from stem_jax.training.trackers.tracker import Ending, Page, Row
from stem_jax.training.trackers.wandb_page import WandbPage
workdir, first, last, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
config = {"train.steps": last, "model.stem_layers": [1, 2], "mesh.data": -1}
facts = {"code.stem_jax": "0123"}
page = WandbPage(Page(workdir, config, facts, 0, "the project", "the name", True, None, 20.0))
if end == "renew":
    page.renew()
print("has", page.begin(), flush=True)
rows = [Row(step, 0.0, {"train/loss": 1 / step, "table/hit_rate": 0.5}) for step in
    range(first, last + 1)]
page.write(rows)
# What an error in between leads to.
assert page.begin() == last
if end == "kill":
    print("written", flush=True)
    time.sleep(600)
page.write_text("sample", "once upon a time")
page.write_picture(workdir / "loss.png")
page.close(Ending.COMPLETE)
"""


def _start(workdir: Path, first: int, last: int, end: str) -> int:
    """Writes these steps; returns the last that was there before."""
    argv = [sys.executable, "-c", START, workdir, first, last, end]
    with subprocess.Popen(
        list(map(str, argv)), cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        found = int(process.stdout.readline().split()[1])
        if end == "kill":
            assert process.stdout.readline() == "written\n"
            process.send_signal(signal.SIGKILL)
    assert process.returncode == (-9 if end == "kill" else 0)
    return found


@pytest.fixture
def workdir(tmp_path):
    from stem_jax.training.metrics import draw_loss

    draw_loss([{"step": 1, "train/loss": 2.0}], tmp_path / "loss.png")
    return tmp_path


@pytest.mark.long
def test_starts_of_a_run_are_one_run(workdir):
    """Each begins behind what the files have, whose last process may have been killed."""
    assert _start(workdir, 1, 400, "kill") == 0
    (killed,) = wandb_files(workdir)
    on_disk = [step for step, _ in wandb_history(wandb_records(killed))]
    assert on_disk == list(range(1, on_disk[-1] + 1)) and len(on_disk) > 100
    assert _start(workdir, on_disk[-1] + 1, 410, "end") == on_disk[-1]
    assert _start(workdir, 411, 412, "end") == 410
    read = list(map(wandb_records, wandb_files(workdir)))
    rows = [row for records in read for row in wandb_history(records)]
    assert [step for step, _ in rows] == list(range(1, 413))
    for step, values in rows:
        assert values["train/loss"] == 1 / step and values["table/hit_rate"] == 0.5
    runs = [next(r["run"] for r in records if r["type"] == "run") for records in read]
    (run_id,) = {run["run_id"] for run in runs}
    assert all(run["project"] == "the project" for run in runs)
    assert all(run["display_name"] == "the name" for run in runs)
    assert json.loads((workdir / "tracking" / "wandb.json").read_text()) == {"id": run_id}
    config = runs[-1]["config"]["update"]
    assert config["model.stem_layers"] == [1, 2] and config["code.stem_jax"] == "0123"
    summary: dict = {}
    for record in (r for r in read[-1] if r["type"] == "summary"):
        summary |= record["summary"].get("update", {})
    assert summary["sample"] == "once upon a time"
    picture = summary.get("loss") or json.loads(summary["loss.path"])
    path = picture["path"] if isinstance(picture, dict) else picture
    assert (wandb_files(workdir)[-1].parent / "files" / path).read_bytes().startswith(b"\x89PNG")


def test_files_are_read_over_the_edges_of_blocks(tmp_path):
    """As LevelDB's log has it: a record lies in parts where a block of 32 KiB ends."""
    from wandb.proto.wandb_internal_pb2 import Record

    def part(kind: int, data: bytes) -> bytes:
        body = bytes([kind]) + data
        return struct.pack("<IH", zlib.crc32(body), len(data)) + body

    data, steps = b":W&B\xe1\xbe\x00", 300
    for step in range(1, steps + 1):
        record = Record()
        record.history.step.num = step
        item = record.history.item.add()
        item.key, item.value_json = "text", json.dumps("x" * 40 * (step % 80))
        left, kinds = record.SerializeToString(), [2, 3]
        while left:
            room = 32768 - len(data) % 32768
            if room <= 7:
                data += bytes(room)
                continue
            now, left = left[: room - 7], left[room - 7 :]
            kind = (1 if kinds == [2, 3] else 4) if not left else kinds[0]
            data, kinds = data + part(kind, now), [3, 3]
    folder = tmp_path / "wandb" / "offline-run-20260101_000000-abc"
    folder.mkdir(parents=True)
    path = folder / "run-abc.wandb"
    assert len(data) > 10 * 32768
    for size, last in ((len(data), steps), (len(data) - 1, steps - 1), (7, 0), (0, 0)):
        path.write_bytes(data[:size])
        assert last_step(tmp_path, "abc") == last
    path.write_bytes(data)
    # One that was begun and has no step yet.
    later = tmp_path / "wandb" / "offline-run-20260101_000001-abc"
    later.mkdir()
    (later / "run-abc.wandb").write_bytes(data[:7])
    assert last_step(tmp_path, "abc") == steps
    assert last_step(tmp_path, "abd") == 0


@pytest.mark.long
def test_a_page_of_its_own(workdir):
    _start(workdir, 1, 5, "end")
    assert _start(workdir, 1, 3, "renew") == 0
    assert len({path.name for path in wandb_files(workdir)}) == 2
