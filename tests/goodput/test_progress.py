"""What a process leaves of its starts: sums over all of them, whatever ended each."""

import json
import math
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stem_jax.errors import InputError
from stem_jax.goodput.account import COMPUTING, PARTS, RESTART, SAVE, START
from stem_jax.goodput.gauges import gauges_path, gauges_text
from stem_jax.goodput.progress import KeptProgress, kept_progress
from stem_jax.goodput.start_record import COMPLETE, StartRecord, read_starts, record_path
from stem_jax.goodput.totals import Totals


def made(**changes) -> StartRecord:
    """A start of ten seconds, steps 1 to 5."""
    values = {
        "process": 0,
        "processes": 2,
        "host": "a",
        "pid": 1,
        "boot": "x",
        "began_clock": 1000.0,
        "began_time": 50_000.0,
        "steps": 20,
        "step": 5,
        "first_step": 1,
        "seconds": 10.0,
        "parts": {START: 4.0, COMPUTING: 6.0},
        "tokens": 500,
        "loss": 2.5,
        "step_seconds": 0.5,
    }
    return StartRecord(**values | changes)


def train(workdir, first: int, last: int, end: str | None = COMPLETE) -> None:
    """A start that makes some steps."""
    with kept_progress(workdir, 0, 1, time.monotonic() - 0.01) as progress:
        progress.began(first - 1, 10, 100)
        for step in range(first, last + 1):
            with progress.part(COMPUTING):
                time.sleep(0.002)
            progress.step_done(step, 1.0 / step, 0.002)
        if end:
            progress.ended(end)


def test_a_gap_between_starts_is_a_restart():
    later = made(began_clock=1012.5, first_step=4, step=9, parts={RESTART: 3.0, COMPUTING: 7.0})
    totals = Totals.of([made(), later])
    assert totals.parts == dict.fromkeys(PARTS, 0) | {START: 4, COMPUTING: 13, RESTART: 5.5}
    assert totals.seconds == 22.5
    # Steps 4 and 5 were made twice.
    assert (totals.starts, totals.steps, totals.redone, totals.tokens) == (2, 11, 2, 1000)


def test_steps_made_a_third_time_are_counted_once_more():
    starts = [made(), made(first_step=3, step=4), made(first_step=3, step=8)]
    assert Totals.of(starts).redone == 2 + 3


def test_clocks_of_two_machines_make_no_negative_part():
    ahead = made(boot="y", began_clock=7.0, began_time=50_000.0 + 3600)
    back = made(began_time=50_030.0, began_clock=1030.0)
    totals = Totals.of([made(), ahead, back])
    assert totals.parts[RESTART] == 3590 and totals.clock_seconds == 3580
    assert totals.seconds == sum(totals.parts.values()) == 3620
    # On one machine the clock of the wall may be set meanwhile.
    moved = made(began_clock=1011.0, began_time=40_000.0)
    assert Totals.of([made(), moved]).parts[RESTART] == 1


def test_records_sum_up_over_starts_to_the_time_of_the_wall(tmp_path):
    began = time.monotonic()
    train(tmp_path, 1, 5, end=None)
    time.sleep(0.05)
    train(tmp_path, 4, 10)
    wall = time.monotonic() - began
    starts = read_starts(record_path(tmp_path, 0))
    assert [(s.first_step, s.step, s.end) for s in starts] == [(1, 5, None), (4, 10, "complete")]
    totals = Totals.of(starts)
    whole = starts[-1].until_clock - starts[0].began_clock
    assert totals.seconds == pytest.approx(whole, abs=0.001)
    # The first start began 10 ms before it was told.
    assert 0.05 < whole <= wall + 0.01
    assert totals.parts[RESTART] > 0.05 and totals.parts[COMPUTING] > 0.02
    assert totals.redone == 2


def test_a_killed_process_leaves_its_last_step_and_a_short_file(tmp_path):
    progress = KeptProgress(tmp_path, 3, 4, time.monotonic())
    size = record_path(tmp_path, 3).stat().st_size
    progress.began(0, 10, 100)
    for step in range(1, 8):
        progress.step_done(step, math.nan, 0.1)
        [start] = read_starts(record_path(tmp_path, 3))
        assert (start.step, start.end, start.loss) == (step, None, None)
    assert record_path(tmp_path, 3).stat().st_size == size


def test_a_start_that_was_refused_leaves_nothing(tmp_path):
    train(tmp_path, 1, 10)
    before = record_path(tmp_path, 0).read_text()
    with pytest.raises(InputError), kept_progress(tmp_path, 0, 1, time.monotonic()):
        raise InputError("refused")
    with kept_progress(tmp_path, 0, 1, time.monotonic()):
        # It was complete.
        pass
    assert record_path(tmp_path, 0).read_text() == before
    with pytest.raises(RuntimeError), kept_progress(tmp_path, 0, 1, time.monotonic()):
        raise RuntimeError("out of\nmemory " + "x" * 5000)
    failed = read_starts(record_path(tmp_path, 0))[-1]
    assert failed.end == "failed" and failed.why.startswith("RuntimeError: out of memory xx")


def test_half_a_line_is_left_out(tmp_path):
    train(tmp_path, 1, 2)
    path = record_path(tmp_path, 0)
    path.write_text(path.read_text() + '{"process": 0, "proc')
    train(tmp_path, 3, 4)
    assert [start.step for start in read_starts(path)] == [2, 4]


def test_a_save_counts_when_it_is_on_the_disk(tmp_path):
    with kept_progress(tmp_path, 0, 1, time.monotonic()) as progress:
        progress.began(0, 10, 100)
        progress.save_ended()
        with progress.long(SAVE):
            [start] = read_starts(record_path(tmp_path, 0))
            assert start.doing == SAVE
            progress.save_begun(4)
        progress.step_done(5, 1.0, 0.1)
        assert read_starts(record_path(tmp_path, 0))[0].saved_step is None
        progress.save_ended()
    [start] = read_starts(record_path(tmp_path, 0))
    assert start.saved_step == 4 and abs(start.saved_time - time.time()) < 5


def test_prometheus_reads_the_gauges(tmp_path):
    workdir = tmp_path / 'a "run"\\'
    workdir.mkdir()
    train(workdir, 1, 5, end=None)
    train(workdir, 4, 10)
    found = {}
    for family in text_string_to_metric_families(gauges_path(workdir, 0).read_text()):
        assert family.documentation
        for sample in family.samples:
            # Counters end in _total, and nothing else does; no unit but seconds is one of time.
            assert sample.name.endswith("_total") == (family.type == "counter"), sample
            assert sample.labels["run"] == 'a "run"\\' and sample.labels["process"] == "0"
            assert sample.timestamp is None
            found[sample.name, sample.labels.get("part")] = sample.value
    assert found["stem_train_step", None] == found["stem_train_target_steps", None] == 10
    assert found["stem_train_loss", None] == 0.1
    assert found["stem_train_steps_total", None] == 12
    assert found["stem_train_tokens_total", None] == 1200
    assert found["stem_train_tokens_per_second", None] == pytest.approx(100 / 0.002)
    assert found["stem_train_restarts_total", None] == 1
    assert found["stem_train_redone_steps_total", None] == 2
    assert found["stem_train_running", None] == 0
    totals = Totals.of(read_starts(record_path(workdir, 0)))
    for part in PARTS:
        value = found["stem_train_time_seconds_total", part]
        assert value == pytest.approx(totals.parts[part], abs=0.001)


def test_gauges_say_when_the_last_save_was_made():
    saved = made(saved_step=4, saved_time=50_009.5)
    text = gauges_text("r", [saved, made(began_clock=1012.0)])
    assert 'stem_train_saved_step{run="r",process="0"} 4.0' in text.splitlines()
    assert 'stem_train_saved_timestamp_seconds{run="r",process="0"} 50009.5' in text.splitlines()
    assert "saved" not in gauges_text("r", [made()])


def test_gauges_are_written_at_most_once_a_second(tmp_path):
    with kept_progress(tmp_path, 0, 1, time.monotonic()) as progress:
        progress.began(0, 100, 1)
        path = gauges_path(tmp_path, 0)
        first = path.read_text()
        for step in range(1, 50):
            progress.step_done(step, 1.0, 0.01)
        assert path.read_text() == first
        assert json.loads(record_path(tmp_path, 0).read_text())["step"] == 49
    assert "stem_train_step{" in path.read_text() and path.read_text() != first
    assert [p.name for p in path.parent.iterdir()] == ["process_000.prom"]
