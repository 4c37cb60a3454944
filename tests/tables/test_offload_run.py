"""A run with rows in host memory as a user sees it: kills, signals, resumes and refusals.

The file is its own child: `python .../test_offload_run.py THREAD CALL FLAGS...` trains, and kills
itself with SIGKILL in a call of `HostStore.write` after the first checkpoint, or, where THREAD is
`restore`, when a checkpoint is read half.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from stem_jax import run as run_module
from stem_jax import run_checks
from stem_jax.errors import InputError
from stem_jax.tables.host_store import HostStore
from stem_jax.train import main
from tests.children import HELD, child, finish, train_flags
from tests.launching import wait_for_records

pytestmark = pytest.mark.little_effort

STEPS = 36
SMALL = {
    "model.vocab_size": 320,
    "model.embed_dim": 32,
    "model.num_layers": 1,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.ffn_dim": 48,
    "model.stem_layers": "0",
    "tables.resident_rows": 128,
    "tables.prefetch": 2,
    "data.tokenizer": "bytes",
    "data.validation_fraction": 0.05,
    "optimizer.warmup_steps": 2,
    "train.steps": STEPS,
    "train.global_batch_size": 8,
    "train.seq_len": 16,
    "train.sample_prompt": "",
    "eval.every": 10,
    "eval.baselines": False,
    "checkpoint.every": 8,
}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    """Documents of Zipf-distributed characters, each from a part of the alphabet of its own."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rng = np.random.default_rng(0)
    # Of one, two and three bytes in UTF-8.
    codes = [*range(0x21, 0x7F), *range(0x80, 0x800, 20), *range(0x1000, 0x10000, 900)]
    alphabet = [chr(code) for code in codes if not 0xD800 <= code < 0xE000]
    ranks = np.minimum(rng.zipf(1.3, (60, 200)) - 1, len(alphabet) - 1)
    starts = rng.integers(0, len(alphabet), 60)
    with path.open("w") as file:
        for ranks_of_document, start in zip(ranks, starts):
            letters = [alphabet[(start + 3 * rank) % len(alphabet)] for rank in ranks_of_document]
            file.write(json.dumps({"text": "".join(letters)}) + "\n")
    return path


def arguments(text_file: Path, workdir: Path, **overrides) -> list[str]:
    return train_flags("tiny_offload", workdir, SMALL | {"data.sources": text_file}, overrides)


def train(argv: list[str], code: int = 0, program=("-m", "stem_jax.train")) -> str:
    """What a run printed; fails if it ends with another code."""
    with child(*program, *argv) as process:
        return finish(process, code)


def records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def final_arrays(workdir: Path, step: int = STEPS) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by item and name, read without knowing the model."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(workdir.absolute() / "checkpoints") as manager:
        items = ("params", "opt_state", "table_rows", "table_slots")
        restored = manager.restore(
            step, args=ocp.args.Composite(**{i: ocp.args.StandardRestore() for i in items})
        )
        return {
            f"{item}/{name}": np.asarray(array)
            for item in items
            for name, array in restored[item].items()
        }


def assert_same_run(one: Path, other: Path) -> None:
    expected, found = final_arrays(one), final_arrays(other)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(array, found[name], err_msg=name)
    for key in ("train/loss", "eval/loss"):
        values = [[r[key] for r in records(folder) if key in r] for folder in (one, other)]
        assert values[0] == values[1] and values[0]


@pytest.fixture(scope="module")
def resident_run(text_file, tmp_path_factory) -> Path:
    """An uninterrupted run with all rows on the device."""
    workdir = tmp_path_factory.mktemp("resident") / "run"
    train(arguments(text_file, workdir, tables__resident_rows="None"))
    return workdir


# The fifth return of rows is some steps after the first checkpoint; in the main thread the next
# save writes back the rows that are on the device.
@pytest.mark.long
@pytest.mark.parametrize(("thread", "call"), [("rows-return", 5), ("MainThread", 1)])
def test_killed_during_a_write_back(resident_run, text_file, tmp_path, thread, call):
    workdir = tmp_path / "run"
    argv = arguments(text_file, workdir)
    train([thread, str(call), *argv], -signal.SIGKILL, program=(__file__,))
    steps = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    assert steps and max(steps) < STEPS
    # Once more, while the rows come from the checkpoint: reading changes nothing there.
    train(["restore", "1", *argv], -signal.SIGKILL, program=(__file__,))
    out = train(argv)
    assert f"resuming from step {max(steps)}" in out
    assert_same_run(resident_run, workdir)
    moved = [r["table/evictions"] for r in records(workdir) if "table/evictions" in r]
    assert sum(moved) > 100


@pytest.mark.long
def test_sigterm_saves_and_a_resident_run_goes_on(resident_run, text_file, tmp_path):
    workdir = tmp_path / "run"
    # No checkpoint is due before the end: what is saved, the signal saved.
    argv = arguments(text_file, workdir, checkpoint__every=0)
    held = ("-c", HELD, "4", str(tmp_path / "go on"))
    with child(*held, *argv, stderr=subprocess.PIPE) as process:
        wait_for_records(workdir, process, 3)
        process.send_signal(signal.SIGTERM)
        (tmp_path / "go on").touch()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err[-3000:]
    assert "the same command continues" in out
    [stopped] = [int(p.name) for p in (workdir / "checkpoints").iterdir()]
    assert stopped < STEPS
    train([*argv, "--config.tables.resident_rows=None"])
    assert_same_run(resident_run, workdir)


# --- Refusals, in this process with its eight devices ---


def test_rows_must_divide_over_the_shards(text_file, tmp_path):
    message = r"table_rows .*dimension=161 .* 8 devices .* make tables.resident_rows a multiple"
    with pytest.raises(InputError, match=message):
        main(arguments(text_file, tmp_path / "run", tables__resident_rows=161))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_little_host_memory_is_refused_before_anything_is_allocated(
    text_file, tmp_path, monkeypatch
):
    def allocate(*args, **kwargs):
        raise AssertionError("a store was allocated")

    monkeypatch.setattr(run_checks, "available_host_bytes", lambda: 10_000)
    monkeypatch.setattr(HostStore, "allocate", allocate)
    monkeypatch.setattr(run_module, "init_state", allocate)
    with pytest.raises(InputError, match=r"resident_rows rows are kept in host memory: .* avail"):
        main(arguments(text_file, tmp_path / "run"))


@pytest.mark.long
def test_too_few_rows_are_refused_with_a_number_that_works(
    text_file, tmp_path, capsys, monkeypatch
):
    def init_state(*args, **kwargs):
        raise AssertionError("a state was made")

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "init_state", init_state)
        with pytest.raises(InputError, match=r"resident_rows=8 is less") as caught:
            main(arguments(text_file, tmp_path / "run", tables__resident_rows=8))
        needed = int(str(caught.value).partition("works for them is ")[2].partition(".")[0])
        with pytest.raises(InputError, match=rf"for them is {needed}\."):
            main(arguments(text_file, tmp_path / "run", tables__resident_rows=needed - 8))
    main(arguments(text_file, tmp_path / "run", tables__resident_rows=needed))
    out = capsys.readouterr().out
    assert f"run complete: step {STEPS}" in out
    moved = [r["table/evictions"] for r in records(tmp_path / "run") if "table/evictions" in r]
    assert sum(moved) > 20


def _killed(name: str, call: int) -> None:
    """Makes this process kill itself half-way through a write."""
    from stem_jax.checkpoints.checkpointer import Checkpointer

    save, write, calls, saved = Checkpointer.save, HostStore.write, [], []

    def counted(self, *args, **kwargs):
        save(self, *args, **kwargs)
        self.wait()
        saved.append(True)

    def killing(self, block, rows, values):
        if saved and threading.current_thread().name.startswith(name):
            calls.append(len(rows))
            if len(calls) == call:
                write(self, block, rows[: len(rows) // 2], values)
                os.kill(os.getpid(), signal.SIGKILL)
        write(self, block, rows, values)

    Checkpointer.save, HostStore.write = counted, killing


def _killed_in_restore() -> None:
    """Makes this process kill itself when one field of the store has come from a checkpoint."""
    from stem_jax.checkpoints import store_handler

    read = store_handler._read

    async def killing(field, info):
        await read(field, info)
        os.kill(os.getpid(), signal.SIGKILL)

    store_handler._read = killing


if __name__ == "__main__":
    if sys.argv[1] == "restore":
        _killed_in_restore()
    else:
        _killed(sys.argv[1], int(sys.argv[2]))
    main(sys.argv[3:])
