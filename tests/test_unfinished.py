"""Ctrl-C while something unfinished is removed: it is removed whole, and then it is interrupted."""

import cProfile
import signal

import pytest

from stem_jax import unfinished as unfinished_module
from stem_jax.files import write_whole
from stem_jax.unfinished import remove


@pytest.fixture
def interrupted(monkeypatch):
    """Removals during which SIGINT comes."""

    def during(path):
        signal.raise_signal(signal.SIGINT)
        remove(path)

    monkeypatch.setattr(unfinished_module, "remove", during)


def test_ctrl_c_during_a_removal_is_heard_behind_it(tmp_path, interrupted):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_hears_it_once_and_who_ignores_it_does_not(tmp_path, interrupted):
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        write_whole(tmp_path / "file", "text")
        assert heard == [signal.SIGINT]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        write_whole(tmp_path / "file", "text")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_python_does_not_know_stays(tmp_path, monkeypatch):
    """Python gives None for one of C, and could not set it again."""
    monkeypatch.setattr(signal, "getsignal", lambda _: None)
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("was replaced"))
    write_whole(tmp_path / "file", "text")


def test_a_write_does_little_with_the_names_beside_it(tmp_path):
    """One comparison of each, seven calls with a path of each."""
    for number in range(500):
        (tmp_path / f"other-{number}").touch()
    profile = cProfile.Profile()
    profile.runcall(unfinished_module._remove_abandoned, tmp_path / "mine")
    assert sum(entry.callcount for entry in profile.getstats()) < 2 * 500
