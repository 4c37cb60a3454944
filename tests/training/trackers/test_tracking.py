"""Which trackers a run has, what it is refused for, and what they are told of it."""

import importlib.util
import json
import os

import pytest

from stem_jax.errors import InputError
from stem_jax.training.metrics import MetricsLog
from stem_jax.training.trackers import tracking
from stem_jax.training.trackers.tracker import Ending
from stem_jax.training.trackers.tracking import Tracking, check_trackers


class Seen:
    """Notes what it is told."""

    def __init__(self, page):
        self.page, self.rows, self.texts, self.pictures, self.ending = page, [], {}, {}, None

    def begin(self):
        return 0

    def write(self, rows):
        self.rows += rows

    def write_text(self, name, content):
        self.texts[name] = content

    def write_picture(self, path):
        self.pictures[path.name] = path.read_bytes()

    def close(self, ending):
        self.ending = ending


@pytest.fixture
def seen(monkeypatch):
    made = []

    def make(page):
        made.append(Seen(page))
        return made[-1]

    monkeypatch.setattr(tracking, "TRACKERS", {"seen": make})
    return made


def test_what_they_are_told(seen, tiny_config, tmp_path):
    config = tiny_config(**{"tracking.trackers": "seen", "tracking.project": "ours"})
    (tmp_path / "before.png").write_bytes(b"of an earlier start")
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"train/loss": 3.0})
    log.close()
    os.utime(tmp_path / "before.png", (0, 0))
    with Tracking(tmp_path) as told:
        told.begin(config, 1)
        log = MetricsLog(tmp_path, 1, tracking=told, awaits=lambda step: step == 2)
        log.write(2, {"train/loss": 2.0, "table/hit_rate": float("nan")})
        log.write(2, {"eval/loss": 2.5})
        log.close()
        told.add_text("sample", "once")
        told.ending = Ending.COMPLETE
    (one,) = seen
    assert [(row.step, row.values) for row in one.rows] == [
        (1, {"train/loss": 3.0}),
        (2, {"train/loss": 2.0, "eval/loss": 2.5}),
    ]
    assert one.texts == {"sample": "once"} and one.ending is Ending.COMPLETE
    assert one.pictures == {"loss.png": (tmp_path / "loss.png").read_bytes()}
    page = one.page
    assert (page.project, page.name, page.start) == ("ours", tmp_path.name, 1)
    assert page.config["model.stem_layers"] == [1, 2] and page.config["data.folder"] is None
    assert set(page.facts) == {"code.stem_jax", "code.jax"}
    assert json.loads(json.dumps(page.config)) == page.config


def test_a_complete_run_is_told_once(seen, tiny_config, tmp_path):
    """The next start tells those trackers that a start which was killed did not; then nobody."""
    config = tiny_config(**{"tracking.trackers": "seen", "train.steps": 2})
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2):
        log.write(step, {"train/loss": 4.0 - step})
    log.close()

    def start() -> bool:
        with Tracking(tmp_path) as told:
            found = told.catch_up(config, 2)
            if found:
                MetricsLog(tmp_path, 2, tracking=told).close()
            return found

    assert start()
    (one,) = seen
    assert [row.values["train/loss"] for row in one.rows] == [3.0, 2.0]
    assert one.ending is Ending.COMPLETE and list(one.pictures) == ["loss.png"]
    assert one.page.start == 2
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert not start() and len(seen) == 1
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    # One that has more steps now is told of them by its own start.
    more = tiny_config(**{"tracking.trackers": "seen", "train.steps": 3})
    with Tracking(tmp_path) as told:
        told.begin(more, 2)
        told.ending = Ending.COMPLETE
    assert Tracking(tmp_path).catch_up(more, 3) is False
    assert Tracking(tmp_path).catch_up(config, 2) is True


def test_losses_that_were_taken_back_are_known(seen, tiny_config, tmp_path, monkeypatch):
    log = MetricsLog(tmp_path, 0)
    for step, loss in ((1, 3.0), (2, 2.0), (3, float("inf"))):
        log.write(step, {"train/loss": loss})
    log.close()
    followed = []
    told = Tracking(tmp_path)
    monkeypatch.setattr(told, "follow", lambda *args: followed.append(args))
    MetricsLog(tmp_path, 1, tracking=told).close()
    ((course,), *_) = followed
    assert [r["step"] for r in course.records] == [1]
    assert course.taken_back == {2: 2.0, 3: None}


def test_an_error_is_how_it_ends(seen, tiny_config, tmp_path):
    with pytest.raises(InputError), Tracking(tmp_path) as told:
        told.begin(tiny_config(**{"tracking.trackers": "seen"}), 0)
        told.ending = Ending.COMPLETE
        raise InputError("full")
    assert seen[0].ending is Ending.FAILED


def test_process_0_alone_reports(seen, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "is_first", lambda: False)
    config = tiny_config(**{"tracking.trackers": "seen,mlflow"})
    monkeypatch.setitem(tracking.TRACKERS, "mlflow", tracking.MlflowPage)
    # What only the first needs is asked there.
    check_trackers(config)
    with Tracking(tmp_path) as told:
        told.begin(config, 0)
    assert seen == []


def test_none(tiny_config, tmp_path):
    config = tiny_config(**{"tracking.trackers": None})
    check_trackers(config)
    with Tracking(tmp_path) as told:
        told.begin(config, 0)
        MetricsLog(tmp_path, 0, tracking=told).close()
    assert not (tmp_path / "tensorboard").exists() and not (tmp_path / "tracking").exists()


@pytest.mark.parametrize(
    ("keys", "hidden", "message"),
    [
        ({"trackers": "tensorboard,comet"}, "", "there is no comet; choose of tensorboard, wandb,"),
        ({"trackers": "wandb"}, "wandb", "wandb is not installed; pip install wandb, or take it"),
        ({"trackers": "mlflow"}, "mlflow", "mlflow is not installed; pip install mlflow-skinny"),
        (
            {"trackers": "mlflow"},
            "",
            "set tracking.mlflow_uri or MLFLOW_TRACKING_URI, such as",
        ),
        ({"trackers": "wandb"}, "", "wandb has no key for https?://.*; run wandb login, set WANDB"),
    ],
)
def test_refused_before_the_run(keys, hidden, message, tiny_config, tmp_path, monkeypatch):
    config = tiny_config(**{f"tracking.{key}": value for key, value in keys.items()})
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == hidden else find(name)
    )
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(InputError, match=f"tracking.trackers.*{message}") as refused:
        check_trackers(config)
    assert "\n" not in str(refused.value)


def test_what_they_need_is_there(tiny_config, tmp_path, monkeypatch):
    check_trackers(tiny_config(**{"tracking.trackers": "wandb", "tracking.offline": True}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:1")
    check_trackers(tiny_config(**{"tracking.trackers": "tensorboard,mlflow"}))
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    check_trackers(tiny_config(**{"tracking.trackers": "wandb"}))
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.ours:8080")
    (tmp_path / "netrc").write_text("machine wandb.ours login user password 1234\n")
    check_trackers(tiny_config(**{"tracking.trackers": "wandb"}))
