"""Told to stop before its first step, a run ends as any stop ends it."""

import os
import signal

import pytest

from stem_jax import run, train
from stem_jax.errors import InputError
from stem_jax.processes.start_stop import stoppable_start
from stem_jax.standing.standing import standing
from tests import launching
from tests.children import finish, gang, train_flags

VALUES = launching.SMALL | {"train.steps": 4}
STATUS = "--stopped-status=79"


@pytest.fixture
def told(monkeypatch):
    """SIGTERM comes when the start calls a function of `run`, which goes on for a while."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def at(name: str) -> None:
        called = getattr(run, name)

        def slow(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            return called(*args, **kwargs)

        monkeypatch.setattr(run, name, slow)

    yield at
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("place", ["open_run_data", "_open_state"])
def test_a_start_is_stopped(told, place, tmp_path, capsys):
    workdir = tmp_path / "run"
    told(place)
    with pytest.raises(SystemExit) as ended:
        train.main([STATUS, *train_flags("tiny", workdir, VALUES, {})])
    assert ended.value.code == 79
    found = standing(workdir)
    assert (found.state, found.step) == ("stopped", 0)
    assert not list(workdir.glob("checkpoints/*")) and not (workdir / ".lock").exists()
    log = (workdir / "logs" / "process_000.log").read_text()
    assert "told to stop before the first step; the same command continues" in log
    assert "Traceback" not in log
    assert capsys.readouterr().err.endswith("told to stop before the first step\n")


def test_what_follows_the_last_step_is_not_stopped(told, tmp_path):
    """The run is complete, and what is left is put away."""
    workdir = tmp_path / "run"
    told("_verdict")
    train.main([STATUS, *train_flags("tiny", workdir, VALUES, {"train__steps": 1})])
    assert standing(workdir).state == "complete"


def test_a_refused_start_of_several_leaves_no_handler():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(InputError), stoppable_start(alone=False):
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            raise InputError("refused")
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


TOLD = """
import os, signal, sys
from stem_jax import run
called = run._open_state
def slow(*args, **kwargs):
    if "--process-index=1" in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
    return called(*args, **kwargs)
run._open_state = slow
"""


@pytest.mark.long
@pytest.mark.little_effort
def test_one_of_two_is_told(tmp_path):
    workdir = tmp_path / "run"
    argv = [STATUS, *train_flags("tiny", workdir, VALUES, {})]
    first, second = gang("stem_jax.train", argv, argv, changes=TOLD)
    with first as one, second as two:
        for process in (one, two):
            finish(process, 79)
    assert standing(workdir).state == "stopped"
    assert not list(workdir.glob("checkpoints/*"))
