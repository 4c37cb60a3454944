"""What goes wrong while rows travel: it is said at once, and nothing hangs or is lost."""

import threading
import time

import jax
import numpy as np
import pytest

from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.errors import InputError
from stem_jax.mesh import axis_size
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.prefetch import Prefetch
from stem_jax.tables.row_slots import TooFewSlots
from stem_jax.tables.spec import TableState
from stem_jax.training.loop import Loop
from stem_jax.training.state import TrainState, table_key
from tests.offloading import SIZES, STEPS, row_threads, rows_of_a_batch, run, variant, zipf_data

SAVED_AT = 30


@pytest.fixture(scope="module")
def tight(train_step):
    """tight(prefetch): a step with the fewest rows on the device: those of one batch."""
    resident = train_step(**SIZES)
    rows = rows_of_a_batch(variant(resident, prefetch=4))
    step = train_step(**SIZES, **{"tables.resident_rows": rows})
    return lambda prefetch=4: variant(step, prefetch=prefetch)


@pytest.fixture(scope="module")
def whole(tight, tmp_path_factory):
    """What comes of a run without faults."""
    return run(tight(), tmp_path_factory.mktemp("whole"))


class Fault:
    """Fails one call in a thread of the rows, some calls after the first checkpoint was due."""

    def __init__(self, threads: str):
        self.error = OSError(5, "memory of the host is broken")
        self.saves = self.applied_since = 0
        self._threads, self._calls, self._happened = threads, 0, False

    def watch(self, state, prefetch):
        self.saves += 1

    def into(self, monkeypatch, owner, name):
        plain, apply = getattr(owner, name), Prefetch.apply

        def failing(*args, **kwargs):
            if self.saves and threading.current_thread().name.startswith(self._threads):
                self._calls += 1
                if self._calls == 5:
                    self._happened = True
                    raise self.error
            return plain(*args, **kwargs)

        def counted(prefetch, arrays, ticket):
            happened = self._happened
            arrays = apply(prefetch, arrays, ticket)
            self.applied_since += happened
            return arrays

        monkeypatch.setattr(owner, name, failing)
        monkeypatch.setattr(Prefetch, "apply", counted)


@pytest.mark.parametrize(
    ("threads", "owner", "name"),
    [
        ("rows-copy", HostStore, "gather"),
        ("rows-stage", jax, "device_put"),
        ("rows-return", HostStore, "write"),
    ],
    ids=["gather", "transfer", "write-back"],
)
def test_a_fault_in_a_thread_stops_the_run(
    tight, whole, tmp_path, monkeypatch, threads, owner, name
):
    fault = Fault(threads)
    with monkeypatch.context() as patched:
        fault.into(patched, owner, name)
        with pytest.raises(OSError) as caught:
            run(tight(), tmp_path / "run", checkpoints=tmp_path, watch=fault.watch)
    # As itself, by the step after at the latest, with the place where it happened.
    assert caught.value is fault.error
    assert any(entry.name == "failing" for entry in caught.traceback)
    assert fault.applied_since <= 1
    assert row_threads() == []
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [SAVED_AT]
    again = run(tight(), tmp_path / "again", resume=(tmp_path, SAVED_AT))
    again.assert_equals(whole, after=SAVED_AT)


@pytest.mark.parametrize("prefetch", [0, pytest.param(4, marks=pytest.mark.long)])
def test_slow_write_backs_are_waited_for(tight, whole, tmp_path, monkeypatch, prefetch):
    """Rows come back while they are still leaving, time and again."""
    write, stage, waited, asked = HostStore.write, Prefetch._stage, [], threading.Event()

    def slow(*args):
        if threading.current_thread().name.startswith("rows-return"):
            # Until the next batch asks for its rows, if one does, and has had the time to read
            # them if it does not wait.
            asked.clear()
            asked.wait(0.2)
            time.sleep(0.02)
        write(*args)

    def counted(self, ticket, waits):
        waited.append(sum(not returned.done() for returned in waits))
        asked.set()
        return stage(self, ticket, waits)

    monkeypatch.setattr(HostStore, "write", slow)
    monkeypatch.setattr(Prefetch, "_stage", counted)
    run(tight(prefetch), tmp_path).assert_equals(whole)
    assert sum(waited) > 20


def test_an_error_of_the_loop_ends_the_threads(tight, tmp_path):
    """Tickets that were never applied hold nobody up."""

    def failing(state, prefetch):
        assert row_threads()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tight(), tmp_path, watch=failing)
    assert row_threads() == []


def test_a_batch_that_does_not_fit_ends_the_run_with_a_save(train_step, whole, tmp_path):
    """It comes in mid-run; with more rows the same run goes on."""
    step = train_step((1, 1, 1), **SIZES)
    batches = [zipf_data(step.config).batches.batch(number) for number in range(20)]
    needs = [len(np.unique(batch["tokens"][batch["segment_ids"] > 0])) for batch in batches]
    # The first that asks for more than any before it, and before any validation.
    large = next(number for number in range(5, 20) if needs[number] > max(needs[:number]))
    rows = {"tables.resident_rows": max(needs[:large])}
    few = variant(train_step((1, 1, 1), **SIZES, **rows), prefetch=4)
    with pytest.raises(TooFewSlots, match=rf"works for them is {needs[large]}\."):
        run(few, tmp_path, checkpoints=tmp_path)
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest_step() == large
    again = run(step, tmp_path / "again", resume=(tmp_path, large))
    again.assert_equals(whole, after=large)


@pytest.mark.parametrize(("shape", "prefetch"), [((1, 1, 1), 0), ((1, 1, 1), 4), ((8, 1, 1), 2)])
def test_the_smallest_that_works_is_named(train_step, shape, prefetch):
    """Rows are brought for all batches and the validation, without their steps."""
    step = variant(train_step(shape, **SIZES), prefetch=prefetch)
    needed, owners = (
        rows_of_a_batch(step),
        axis_size(step.mesh, step.reads.specs["stem"].vocab_axes),
    )
    bring_all(train_step(shape, **SIZES, **{"tables.resident_rows": needed}), prefetch)
    rows = needed - owners
    # A number that the run can be given as it is.
    message = rf"resident_rows={rows} is less .* works for them is {needed}\. Raise it"
    with pytest.raises(InputError, match=message):
        bring_all(train_step(shape, **SIZES, **{"tables.resident_rows": rows}), prefetch)


def bring_all(step, prefetch):
    step = variant(step, prefetch=prefetch)
    data = zipf_data(step.config)
    store = HostStore.create(step.reads.specs["stem"], table_key(step.config), step.mesh)
    with Prefetch(step.mesh, store, "lfu", prefetch) as moving:
        state = TrainState(*[None] * 6, {"stem": TableState(**moving.load())})
        loop = Loop(step.config, step, data, None, {"stem": moving}, None, None, None)
        batches = map(data.batches.batch, range(STEPS))
        for ahead in (
            loop._look_ahead(batches, STEPS),
            loop._look_ahead(data.held_out, len(data.held_out), training=False),
        ):
            for ready in ahead:
                state = ahead.place(state, ready)
