"""A run that is killed, stopped and goes on, in every tracker: each step once, none missing."""

import json
import signal
from pathlib import Path

import pytest

from tests.children import child, free_port, train_flags
from tests.launching import SMALL, wait_for_records, wait_until
from tests.tracker_files import (
    mlflow_server,
    tensorboard_events,
    tensorboard_shows,
    wandb_files,
    wandb_history,
    wandb_records,
)

STEPS = 90
TRACKERS = {
    "tracking.trackers": "tensorboard,wandb,mlflow",
    "tracking.offline": True,
    # A busy machine may take longer than users would wait.
    "tracking.timeout": 240,
    "train.steps": STEPS,
    "train.sample_prompt": "The",
    "train.sample_tokens": 2,
    "checkpoint.every": 7,
    "eval.every": 10,
    "eval.max_batches": 1,
}
# Of a machine's speed, which a step that is made again does not have again.
SPEED = ("train/step_seconds", "train/tokens_per_second", "train/matmul_tflops_per_second")


def _recorded(workdir: Path) -> dict[int, dict[str, float]]:
    """What the run's own file has, by step."""
    found: dict[int, dict] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record.pop("step"), {}).update(record)
    return found


def _but_speed(values: dict) -> dict:
    """Without what a step that is made again has of its own: its times, and those of its start."""
    own = {*SPEED, "train/startup_seconds"}
    return {k: v for k, v in values.items() if k not in own and not k.startswith("_")}


def _arrived(client) -> int:
    """The last step of the one run that the server has, 0 for none."""
    experiment = client.get_experiment_by_name("stem_jax")
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    return int(runs[0].data.metrics.get("step", 0)) if runs else 0


@pytest.mark.long
@pytest.mark.little_effort
def test_a_run_resumed_twice(tmp_path):
    """Killed, then told to stop; seen by what each tracker's own programs read."""
    from mlflow import MlflowClient

    workdir = tmp_path / "run"
    (tmp_path / "mlflow").mkdir()
    with mlflow_server(tmp_path / "mlflow") as address:
        keys = SMALL | TRACKERS | {"tracking.mlflow_uri": address}
        # Steps long enough that each signal finds the run under way.
        keys |= {"train.global_batch_size": 128, "train.seq_len": 128}
        argv = ["-m", "stem_jax.train", *train_flags("tiny", workdir, keys, {})]
        client = MlflowClient(address)
        for records, number in ((30, signal.SIGKILL), (60, signal.SIGTERM), (0, None)):
            with child(*argv) as process:
                if number is not None:
                    wait_for_records(workdir, process, records)
                    wait_until(lambda least=records - 30: _arrived(client) > least, process)
                    process.send_signal(number)
                said = process.communicate(timeout=300)[0]
            expected = -signal.SIGKILL if number == signal.SIGKILL else 0
            assert process.returncode == expected, said[-3000:]
        assert "did not end" not in said and "fails" not in said, said[-3000:]
        recorded = _recorded(workdir)
        assert list(recorded) == list(range(1, STEPS + 1))

        (experiment,) = client.search_experiments(filter_string="name = 'stem_jax'")
        (run,) = client.search_runs([experiment.experiment_id])
        assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
        assert run.data.params["checkpoint.every"] == "7" and "code.stem_jax" in run.data.tags
        for key in ("train/loss", "eval/loss", "table/distinct_rows", "train/grad_norm"):
            history = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
            assert sorted(history) == [(s, v[key]) for s, v in recorded.items() if key in v], key
        artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert artifacts == {"loss.png", "sample.txt"}

    read = list(map(wandb_records, wandb_files(workdir)))
    assert len(read) == 3
    rows = [row for records in read for row in wandb_history(records)]
    assert [step for step, _ in rows] == list(range(1, STEPS + 1))
    for step, values in rows:
        assert _but_speed(values) == _but_speed(recorded[step])

    shown = tensorboard_shows(workdir / "tensorboard")
    assert sorted(shown) == list(range(1, STEPS + 1))
    for step, values in shown.items():
        scalars = [value for value in values if value.HasField("simple_value")]
        assert len({value.tag for value in scalars}) == len(scalars)
        loss = next(value.simple_value for value in scalars if value.tag == "train/loss")
        assert loss == pytest.approx(recorded[step]["train/loss"], rel=1e-6)
    tags = {value.tag for value in shown[STEPS]}
    assert {"loss", "sample/text_summary", "eval/loss"} <= tags


@pytest.mark.long
@pytest.mark.little_effort
def test_a_run_that_ended_before_its_tracker_knew(tmp_path):
    """Nobody listened until it was complete: the next start tells all, the one after nothing."""
    from mlflow import MlflowClient

    workdir, port = tmp_path / "run", free_port()
    keys = {
        "tracking.trackers": "tensorboard,mlflow",
        "tracking.mlflow_uri": f"http://127.0.0.1:{port}",
        "tracking.timeout": 2,
        "train.steps": 20,
        "train.sample_prompt": "The",
        "train.sample_tokens": 2,
    }

    def start(keys: dict) -> str:
        with child("-m", "stem_jax.train", *train_flags("tiny", workdir, keys, {})) as process:
            said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said[-3000:]
        return said

    assert "mlflow did not end within 2 s" in start(SMALL | keys)
    events = tensorboard_events(workdir / "tensorboard")
    (tmp_path / "mlflow").mkdir()
    with mlflow_server(tmp_path / "mlflow") as address:
        keys |= {"tracking.mlflow_uri": address, "tracking.timeout": 240}
        said = start(SMALL | keys)
        assert "run complete" in said and "telling mlflow what" in said
        client = MlflowClient(address)
        (experiment,) = client.search_experiments(filter_string="name = 'stem_jax'")
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.status == "FINISHED"
        history = client.get_metric_history(run.info.run_id, "train/loss")
        expected = [(step, values["train/loss"]) for step, values in _recorded(workdir).items()]
        assert sorted((m.step, m.value) for m in history) == expected
        artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert artifacts == {"loss.png", "sample.txt"}
        assert "telling" not in start(SMALL | keys)
        assert client.get_run(run.info.run_id).info.end_time == run.info.end_time
    assert tensorboard_events(workdir / "tensorboard") == events


@pytest.mark.long
@pytest.mark.little_effort
def test_trackers_that_are_away_do_not_stop_a_run(tmp_path):
    """Nobody listens for the one; for the other somebody does who never answers."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as deaf, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        keys = (
            SMALL
            | TRACKERS
            | {
                "tracking.mlflow_uri": f"http://127.0.0.1:{closed.getsockname()[1]}",
                "tracking.offline": False,
                "tracking.timeout": 5,
                "train.steps": 20,
            }
        )
        environment = {
            "WANDB_BASE_URL": f"http://127.0.0.1:{deaf.getsockname()[1]}",
            "WANDB_API_KEY": "a" * 40,
        }
        argv = train_flags("tiny", tmp_path / "run", keys, {})
        with child("-m", "stem_jax.train", *argv, **environment) as process:
            said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-3000:]
    assert "run complete: step 20" in said
    assert said.count("mlflow fails (") == 1
    for name in ("wandb", "mlflow"):
        assert f"{name} did not end within" in said
    shown = tensorboard_shows(tmp_path / "run" / "tensorboard")
    assert sorted(shown) == list(range(1, 21))
