"""A run as a user sees it: real processes, real signals, real files."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax.profiler import ProfileData

from stem_jax.checkpoints.loading import load_run
from stem_jax.errors import InputError, TrainingError
from stem_jax.train import main
from tests import effort
from tests.children import HELD, train_flags
from tests.launching import wait_for_checkpoint, wait_for_records

pytestmark = pytest.mark.little_effort

TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 4,
    "Token-indexed tables hold one row for each token; only rows in a batch are read. " * 5,
    "A run that is killed goes on from its last checkpoint as if nothing had happened. " * 3,
] * 6
SMALL = {
    "model.vocab_size": 320,
    "model.embed_dim": 32,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.ffn_dim": 64,
    "data.tokenizer": "bytes",
    "data.validation_fraction": 0.2,
    "optimizer.warmup_steps": 2,
    "train.steps": 12,
    "train.global_batch_size": 8,
    "train.seq_len": 64,
    "train.sample_tokens": 4,
    "eval.every": 6,
    "checkpoint.every": 4,
}

# Without what is printed at the end, which takes as long as the steps.
SILENT = {"train__sample_prompt": "", "eval__baselines": False}

ONE_LAYER = {"model__num_layers": 1, "model__stem_layers": "0"}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": f"{index}. {text}"}) for index, text in enumerate(TEXT)]
    path.write_text("\n".join(lines))
    return path


def arguments(text_file: Path, workdir: Path, **overrides) -> list[str]:
    return train_flags("tiny", workdir, SMALL | {"data.sources": text_file}, overrides)


def start(argv: list[str], program=("-m", "stem_jax.train")) -> subprocess.Popen:
    # One device, as on a user's machine.
    environment = os.environ | {"XLA_FLAGS": effort.flags()}
    return subprocess.Popen(
        [sys.executable, *program, *argv],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    return out, err


def records(workdir: Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def final_arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
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


@pytest.fixture(scope="module")
def whole_run(text_file, tmp_path_factory):
    """An uninterrupted run, two of its steps traced: its folder and what it printed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    keys = {"train__profile_steps": "8-9", "checkpoint__keep": 3}
    out, err = finish(start(arguments(text_file, workdir, **keys)))
    return workdir, out, err


def test_run_leaves_what_it_promises(whole_run):
    workdir, out, err = whole_run
    train = [r for r in records(workdir) if "train/loss" in r]
    assert [r["step"] for r in train] == list(range(1, 13))
    assert train[-1]["train/loss"] < train[0]["train/loss"] - 0.3
    assert [r["step"] for r in records(workdir) if "eval/loss" in r] == [6, 12]
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 12
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").glob("events*"))
    for promised in ("parameters   total", "memory       per device", "table        layer 1"):
        assert promised in out
    assert "512 tokens per step" in out
    assert "bits per byte" in out and "token unigrams" in out and "xz -9" in out
    assert "tokens/s" in err and "loss" in err


def test_a_trace_names_the_parts_of_a_step(whole_run):
    """As its readers see it: both steps and no other, and the parts in the program beside them."""
    workdir, out, _ = whole_run
    assert f"trace of steps 8 to 9: {workdir / 'profile'}" in out
    (path,) = (workdir / "profile").rglob("*.xplane.pb")
    runs = set()
    for plane in ProfileData.from_file(str(path)).planes:
        for event in (event for line in plane.lines for event in line.events):
            stats = dict(event.stats)
            if stats.get("hlo_module") == "jit__update":
                runs.add(stats["run_id"])
    assert len(runs) == 2
    text = path.read_bytes()
    for name in ("block_matmuls", "row_gradient", "exchange", "head_loss", "row_optimizer"):
        assert f"part.{name}".encode() in text


def test_second_start_says_complete(whole_run, text_file):
    workdir, _, _ = whole_run
    out, _ = finish(start(arguments(text_file, workdir)))
    assert "run complete" in out


def test_kill_then_same_command_is_bit_equal(whole_run, text_file, tmp_path):
    workdir = tmp_path / "run"
    held = ("-c", HELD, "8", str(tmp_path / "never"))
    process = start(arguments(text_file, workdir, **SILENT), held)
    wait_for_records(workdir, process, 7)
    # The save of step 4 may still go on.
    wait_for_checkpoint(workdir, process, 4)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    out, _ = finish(start(arguments(text_file, workdir, **SILENT)))
    assert "resuming from step" in out
    assert_same_run(whole_run[0], workdir)


@pytest.mark.long  # tests/tables/test_offload_run.py has it with rows in host memory
def test_sigterm_saves_exits_0_and_continues_bit_equal(whole_run, text_file, tmp_path):
    workdir = tmp_path / "run"
    # No checkpoint is due before the end: what is saved, the signal saved.
    argv = arguments(text_file, workdir, checkpoint__every=0, **SILENT)
    process = start(argv, ("-c", HELD, "4", str(tmp_path / "go on")))
    wait_for_records(workdir, process, 3)
    process.send_signal(signal.SIGTERM)
    (tmp_path / "go on").touch()
    out, _ = finish(process)
    assert "the same command continues" in out
    assert next(int(p.name) for p in (workdir / "checkpoints").iterdir()) < 12
    finish(start(argv))
    assert_same_run(whole_run[0], workdir)


def assert_same_run(one: Path, other: Path) -> None:
    expected, found = final_arrays(one, 12), final_arrays(other, 12)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(array, found[name], err_msg=name)
    for key in ("train/loss", "eval/loss"):
        assert [r[key] for r in records(one) if key in r] == [
            r[key] for r in records(other) if key in r
        ]


def test_changed_config_is_refused_by_name(whole_run, text_file):
    workdir = whole_run[0]
    with pytest.raises(InputError, match=r"optimizer\.beta1: 0\.9 -> 0\.8"):
        main(arguments(text_file, workdir, optimizer__beta1=0.8))
    # A longer run under a cosine would have had other rates from the first step on.
    with pytest.raises(InputError, match=r"train\.steps changed the learning rates"):
        main(arguments(text_file, workdir, train__steps=20))


def test_harmless_changes_pass(whole_run, text_file, capsys):
    workdir = whole_run[0]
    main(arguments(text_file, workdir, checkpoint__every=5, train__log_every=3, mesh__fsdp=2))
    assert "run complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train__stepz": 3}, r"train\.stepz; did you mean train\.steps"),
        ({"train__global_batch_size": 6}, r"train\.global_batch_size=6 .* divide"),
        ({"mesh__tensor": 3}, r"mesh\.tensor=3 .* 8 devices"),
        ({"data__sources": "nowhere/*.txt"}, r"nowhere/\*\.txt"),
        ({"model__vocab_size": 200}, r"model\.vocab_size=200 is smaller .* 258"),
        (
            {"optimizer__schedule": "inv_sqrt", "optimizer__warmup_steps": 0},
            r"optimizer\.warmup_steps=0 .* to 1 or more",
        ),
    ],
)
def test_refused_input_names_value_and_remedy(text_file, tmp_path, overrides, message):
    with pytest.raises(InputError, match=message):
        main(arguments(text_file, tmp_path / "run", **overrides))


def test_refused_input_is_one_line_and_exit_1(text_file, tmp_path):
    process = start(arguments(text_file, tmp_path / "run", train__stepz=3))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.splitlines() == ["error: unknown config key train.stepz; did you mean train.steps?"]
    process = start(["--confg=x"])
    process.communicate(timeout=120)
    assert process.returncode == 2


def test_refused_text_is_one_line_too(tmp_path):
    """Later refusals come after folders and threads exist; they leave no trace of either."""
    process = start(arguments(tmp_path / "nothing.txt", tmp_path / "run"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert out == ""
    assert len(err.splitlines()) == 1 and "nothing.txt" in err


@pytest.mark.long
def test_resuming_reads_what_was_prepared(text_file, tmp_path, capsys):
    text = tmp_path / "gone.jsonl"
    shutil.copy(text_file, text)
    workdir = tmp_path / "run"
    flags = SILENT | ONE_LAYER | {"mesh__fsdp": 1, "optimizer__schedule_steps": 4}
    main(arguments(text, workdir, train__steps=2, **flags))
    before = {p: p.read_bytes() for p in (workdir / "data").rglob("*.bin")}
    text.unlink()
    main(arguments(text, workdir, train__steps=4, **flags))
    said = capsys.readouterr().out
    assert "resuming from step 2" in said
    # It has nobody to join.
    assert re.search(r"s after the start: imports and devices [\d.]+, data [\d.]+, state", said)
    assert before == {p: p.read_bytes() for p in (workdir / "data").rglob("*.bin")}


def test_damaged_ids_are_refused(copied_run, text_file):
    [tokens] = (copied_run / "data").rglob("train/tokens.bin")
    raw = bytearray(tokens.read_bytes())
    raw[: len(raw) // 2] = b"\xff" * (len(raw) // 2)
    tokens.write_bytes(bytes(raw))
    shutil.rmtree(copied_run / "checkpoints" / "12")
    with pytest.raises(InputError, match=r"holds id 65535 .* outside its vocabulary of 258"):
        main(arguments(text_file, copied_run))


def test_unwritable_work_folder(text_file, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        main(arguments(text_file, tmp_path / "file" / "run"))


@pytest.fixture
def copied_run(whole_run, tmp_path) -> Path:
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(whole_run[0], tmp_path / "copy"))


def test_other_tokenizer_is_refused(copied_run, text_file):
    from stem_jax.data.sentencepiece_training import train_sentencepiece
    from stem_jax.data.tokenizer import load_tokenizer

    model = copied_run / "other.model"
    train_sentencepiece(TEXT, model, 300)
    shutil.rmtree(copied_run / "tokenizer")
    load_tokenizer("sentencepiece", model).save(copied_run / "tokenizer")
    with pytest.raises(InputError, match="tokenizer"):
        main(arguments(text_file, copied_run))


def test_an_incomplete_checkpoint_is_refused_with_a_way_out(copied_run):
    newest = copied_run / "checkpoints" / "12"
    shutil.rmtree(newest / "table_rows")
    with pytest.raises(InputError, match=r"12 is incomplete .* delete that folder"):
        load_run(copied_run)


def test_damaged_checkpoints_are_set_aside(copied_run, text_file):
    """The newest is cut short, the one before is empty."""
    expected = final_arrays(copied_run, 12)
    newest, before = (copied_run / "checkpoints" / step for step in ("12", "8"))
    [path, *_] = sorted((newest / "table_rows").rglob("d/*"))
    size = path.stat().st_size
    os.truncate(path, size - 1)
    shutil.rmtree(before)
    before.mkdir()
    out, _ = finish(start(arguments(text_file, copied_run, **SILENT)))
    what = f"{path.relative_to(newest)} has {size - 1} bytes of {size}"
    assert f"checkpoint 12 is damaged ({what})" in out
    assert "checkpoint 8 is damaged (without files.json and any item)" in out
    assert "resuming from step 4" in out
    assert sorted(os.listdir(copied_run / "damaged_checkpoints")) == ["12", "8"]
    for name, array in final_arrays(copied_run, 12).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_damage_to_every_checkpoint_is_refused(copied_run, text_file):
    for folder in (copied_run / "checkpoints").iterdir():
        os.truncate(folder / "params" / "manifest.ocdbt", 1)
    with pytest.raises(
        InputError, match=r"is whole \(the newest, 12: params/manifest.ocdbt has 1 "
    ):
        main(arguments(text_file, copied_run))
    assert not (copied_run / "damaged_checkpoints").exists()


def test_newer_format_is_refused(copied_run, text_file):
    layout = copied_run / "checkpoints" / "12" / "layout" / "metadata"
    (layout.parent.parent / "files.json").unlink()
    layout.write_text(json.dumps(json.loads(layout.read_text()) | {"format": 99}))
    with pytest.raises(InputError, match=r"format 99.*by a newer stem_jax"):
        main(arguments(text_file, copied_run))


@pytest.mark.long
def test_bad_steps_stop_the_run_and_the_checkpoint_stands(text_file, tmp_path):
    workdir = tmp_path / "run"
    flags = {"optimizer__schedule": "constant", "train__max_bad_steps": 3, "train__steps": 40}
    flags |= ONE_LAYER
    blow_up = {"optimizer__learning_rate": 1e30, "optimizer__weight_decay": 0.0}
    with pytest.raises(TrainingError, match=r"not finite in 3 steps in a row"):
        main(arguments(text_file, workdir, **flags, **blow_up, checkpoint__every=1))
    steps = [int(p.name) for p in (workdir / "checkpoints").iterdir()]
    log = [r for r in records(workdir) if "train/loss" in r]
    assert log[-1]["train/skipped_steps"] == 3
    arrays = final_arrays(workdir, min(steps))
    assert all(np.isfinite(array).all() for array in arrays.values())
