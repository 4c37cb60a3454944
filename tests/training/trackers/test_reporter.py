"""A tracker gets every step once, and whatever it does, the run goes on."""

import logging
import threading
import time
from types import SimpleNamespace

import pytest

from stem_jax.training.trackers import reporter
from stem_jax.training.trackers.reporter import Reporter, text
from stem_jax.training.trackers.tracker import Course, Ending, Row


class Shown:
    """A tracker in memory that does what a test wants: `trouble` is called in each of its calls."""

    def __init__(self, last: int = 0, trouble=lambda call: None):
        self.last, self.trouble = last, trouble
        self.rows: list[Row] = []
        self.texts: dict[str, str] = {}
        self.renewals, self.ending = 0, None

    def begin(self) -> int:
        self.trouble("begin")
        return max([row.step for row in self.rows], default=self.last)

    def renew(self) -> None:
        self.rows, self.last, self.renewals = [], 0, self.renewals + 1

    def write(self, rows) -> None:
        self.trouble("write")
        self.rows += rows
        self.trouble("written")

    def write_text(self, name, content) -> None:
        self.trouble("text")
        self.texts[name] = content

    def close(self, ending) -> None:
        self.ending = ending

    @property
    def steps(self) -> list[int]:
        return [row.step for row in self.rows]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name in ("_PAUSE_SECONDS", "_FIRST_WAIT", "_LONGEST_WAIT"):
        monkeypatch.setattr(reporter, name, 0.01)


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "stem_jax")
    return caplog


def _losses(*steps: int) -> list[dict]:
    return [{"step": step, "train/loss": 1.0 / step, "table/rows": 7} for step in steps]


def _report(shown: Shown, records, awaits=lambda step: False, taken_back=None, seconds=60.0):
    """Follows the records to the end."""
    told = Reporter("shown", shown)
    told.follow(Course(records, awaits, taken_back or {}))
    told.end(Ending.COMPLETE)
    told.wait(seconds)
    return shown


def test_an_end_is_seen_whenever_it_comes(monkeypatch):
    class Event(threading.Event):
        before_clear = staticmethod(lambda: None)

        def clear(self):
            self.before_clear()
            super().clear()

    monkeypatch.setattr(reporter, "threading", SimpleNamespace(Event=Event))
    shown = Shown()
    told = Reporter("shown", shown)
    told._wake.before_clear = lambda: told.end(Ending.COMPLETE)
    told.follow(Course(_losses(1)))
    told.wait(5.0)
    assert shown.ending is Ending.COMPLETE


def test_records_of_a_step_are_one_row(said):
    records = [*_losses(1, 2), {"step": 2, "eval/loss": 5.0}, *_losses(3)]
    shown = _report(Shown(), records)
    assert [(row.step, row.values) for row in shown.rows] == [
        (1, {"train/loss": 1.0, "table/rows": 7}),
        (2, {"train/loss": 0.5, "table/rows": 7, "eval/loss": 5.0}),
        (3, {"train/loss": 1 / 3, "table/rows": 7}),
    ]
    assert shown.ending is Ending.COMPLETE and not said.records


def test_many_rows_come_in_parts_and_null_is_left_out():
    records = _losses(*range(1, 131))
    records[4]["train/loss"] = None
    calls: list[str] = []
    shown = _report(Shown(trouble=calls.append), records)
    assert shown.steps == list(range(1, 131)) and calls.count("write") == 3
    assert shown.rows[4].values == {"table/rows": 7}


def test_records_come_while_it_goes_on():
    shown, records = Shown(), []
    told = Reporter("shown", shown)
    told.follow(Course(records))
    for step in range(1, 6):
        records += _losses(step)
        told.wake()
        _until(lambda step=step: shown.steps == list(range(1, step + 1)))
    told.end(Ending.STOPPED)
    told.wait(60)
    assert shown.ending is Ending.STOPPED


def test_a_step_waits_for_its_validation():
    """Whether this start makes it or the next one."""
    validates = lambda step: step % 2 == 0  # noqa: E731
    shown = _report(Shown(), _losses(1, 2), validates)
    assert shown.steps == [1]
    shown = _report(shown, [*_losses(1, 2), {"step": 2, "eval/loss": 5.0}], validates)
    assert shown.steps == [1, 2] and shown.rows[1].values["eval/loss"] == 5.0
    # Without one, but the run went on.
    assert _report(shown, _losses(1, 2, 3, 4, 5), validates).steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("last", [0, 3, 5])
def test_a_next_start_reports_what_is_missing(last):
    shown = _report(Shown(last), _losses(*range(1, 9)))
    assert shown.steps == list(range(last + 1, 9))


@pytest.mark.parametrize("place", ["begin", "write", "written", "text"])
@pytest.mark.parametrize("error", [OSError("the server\nis away"), SystemExit(1)])
def test_one_that_fails_is_asked_again(place, error, said):
    """Also where it took what it then failed to say so."""
    failures = [error] * (1 if place == "written" else 3)

    def trouble(call):
        if call == place and failures:
            raise failures.pop()

    shown = Shown(trouble=trouble)
    told = Reporter("shown", shown)
    told.follow(Course(_losses(1, 2, 3)))
    told.add(text("sample", "once"))
    _until(lambda: shown.texts)
    told.end(Ending.COMPLETE)
    told.wait(60)
    assert shown.steps == [1, 2, 3] and shown.texts == {"sample": "once"}
    assert shown.ending is Ending.COMPLETE and not failures
    warnings = [r.getMessage() for r in said.records if r.levelno == logging.WARNING]
    what = "OSError: the server is away" if isinstance(error, OSError) else "SystemExit: 1"
    again = "the run goes on, and it is tried again until it has all steps"
    assert warnings == [f"shown fails ({what}); {again}"]
    assert "shown answers again" in said.text


def test_one_that_hangs_is_left(said):
    gone_on = threading.Event()
    shown = Shown(trouble=lambda call: gone_on.wait() if call == "write" else None)
    before = time.monotonic()
    _report(shown, [*_losses(1, 2, 3), {"step": 3, "eval/loss": 1.0}], seconds=0.3)
    assert 0.25 < time.monotonic() - before < 30
    [warning] = said.records
    assert warning.getMessage().startswith("shown did not end within 0 s (tracking.timeout)")
    gone_on.set()
    _until(lambda: not any(t.name == "tracker shown" for t in threading.enumerate()))


def test_one_that_is_away_at_the_end(said):
    def away(call):
        raise ConnectionError("nobody")

    before = time.monotonic()
    shown = _report(Shown(trouble=away), _losses(1, 2, 3), seconds=0.3)
    assert time.monotonic() - before < 30 and shown.ending is None
    failing, left = [r.getMessage() for r in said.records]
    assert "ConnectionError: nobody" in failing
    assert "with 3 steps to report; they are in metrics.jsonl" in left
    _until(lambda: not any(t.name == "tracker shown" for t in threading.enumerate()))


def test_steps_made_again_as_before_are_not_shown_twice(said):
    # On another mesh the last bits differ.
    taken_back = {step: 1.0 / step * (1 + 1e-6) for step in (3, 4, 5)}
    shown = Shown()
    shown.rows = [Row(step, 0.0, {}) for step in range(1, 6)]
    _report(shown, _losses(*range(1, 8)), taken_back=taken_back)
    assert shown.steps == list(range(1, 8)) and shown.renewals == 0 and not said.records


@pytest.mark.parametrize("before", [9.0, None])
def test_steps_that_come_out_otherwise_get_a_page_of_their_own(before, said):
    """As after a loss that grew, with a lower learning rate."""
    shown = Shown()
    shown.rows = [Row(step, 0.0, {"train/loss": 100.0}) for step in range(1, 6)]
    _report(shown, _losses(*range(1, 8)), taken_back={3: 1 / 3, 4: before, 5: 9.0})
    assert shown.renewals == 1 and shown.steps == list(range(1, 8))
    assert [row.values["train/loss"] for row in shown.rows] == [1 / s for s in range(1, 8)]
    assert "shown: step 4 is another than the one that was reported before" in said.text


def _until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
