"""Steps of other sizes compile on a thread: which, when, and that a run then finds its program."""

import itertools
import threading
import types

import jax
import pytest

from stem_jax import background
from stem_jax.tables import block_sizes
from stem_jax.tables.block_sizes import BlockSizes, levels_above, nearly_filled, sizes_at
from stem_jax.training import levels_ahead
from stem_jax.training.levels_ahead import LevelsAhead
from stem_jax.training.reads import ReadSizes
from tests.offloading import SIZES, run

COMPILED = "/jax/core/compile/backend_compile_duration"
LEVELS = [BlockSizes(n, n) for n in (10, 20, 30, 40)]


class Programs:
    """A train step whose programs take as long to compile as the test says."""

    def __init__(self, platform: str):
        self.mesh = types.SimpleNamespace(
            devices=types.SimpleNamespace(flat=[types.SimpleNamespace(platform=platform)])
        )
        self.reads = self
        self.begun, self.go_on, self.error = [], threading.Semaphore(0), None
        self.near = []

    def larger_sizes(self, batch, demand, sizes, *, near):
        above = LEVELS[LEVELS.index(sizes) + 1 :]
        return above[:1] * (batch in self.near) if near else above

    def compile_update(self, state, batch, schedule, slots, sizes):
        self.begun.append(sizes)
        assert self.go_on.acquire(timeout=10)
        if self.error:
            raise self.error


@pytest.fixture
def steps(monkeypatch):
    """steps(platform): the programs, and a function that runs a step of a level."""
    monkeypatch.setattr(levels_ahead, "_described", lambda array: array)
    found = []

    def make(platform):
        programs = Programs(platform)
        found.append(programs)
        levels = LevelsAhead(programs)

        def step(level, batch=0):
            ready = types.SimpleNamespace(batch=batch, demand=True, sizes=LEVELS[level], slots={})
            levels.await_step(ready)
            levels.after_step(0, ready, 0)
            return [LEVELS.index(sizes) for sizes in programs.begun]

        def compiled():
            programs.go_on.release()
            levels._compiling[1].exception(20)

        return programs, step, compiled

    yield make
    for programs in found:
        for _ in LEVELS:
            programs.go_on.release()


def test_on_tpus_all_levels_follow_the_first_step_one_at_a_time(steps):
    _programs, step, compiled = steps("tpu")
    assert step(0) == []
    assert step(0) == step(0) == [1]
    compiled()
    assert step(0) == step(0) == [1, 2]
    compiled()
    assert step(0) == [1, 2, 3]
    compiled()
    assert step(0) == step(3) == [1, 2, 3]


def test_elsewhere_the_next_level_compiles_when_a_batch_nearly_needs_it(steps, monkeypatch):
    monkeypatch.setattr(levels_ahead, "_FIRST_STEPS", 3)
    programs, step, compiled = steps("cpu")
    programs.near = ["near"]
    # Runs of few steps compile nothing that they do not use.
    assert step(0, "near") == step(0, "near") == step(0, "near") == []
    assert step(0) == step(0) == []
    assert step(0, "near") == step(0, "near") == [1]
    compiled()
    assert step(0, "near") == step(1) == [1]
    assert step(1, "near") == [1, 2]


def test_a_level_that_a_step_has_compiled_is_not_compiled_again(steps):
    _programs, step, compiled = steps("tpu")
    step(1)
    assert step(0) == [2]
    compiled()
    assert step(0) == [2, 3]


def test_a_step_waits_for_its_program_and_compiles_itself_where_that_failed(steps):
    programs, step, _ = steps("tpu")
    step(0), step(0)
    programs.error = RuntimeError("out of memory")
    waiting = threading.Thread(target=step, args=(1,))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    programs.go_on.release()
    waiting.join(20)
    assert not waiting.is_alive()


def test_a_dense_model_has_no_levels(steps):
    programs, *_ = steps("tpu")
    levels = LevelsAhead(programs)
    ready = types.SimpleNamespace(demand={}, sizes=None)
    for _ in range(3):
        levels.await_step(ready)
        levels.after_step(0, ready, 0)
    assert programs.begun == []


def test_levels_above():
    first, largest = BlockSizes(1000, 1000), BlockSizes(9000, 2000)
    # Of two tables, at one level.
    firsts, most = [first, BlockSizes(10, 10)], [largest, BlockSizes(20, 20)]
    levels = [
        tuple(sizes_at(level, *pair) for pair in zip(firsts, most, strict=True))
        for level in range(block_sizes.LEVELS)
    ]
    assert levels_above(levels[0], firsts, most) == levels[1:]
    assert levels_above(levels[2], firsts, most) == [tuple(most)]
    assert levels_above(tuple(most), firsts, most) == []
    # Where all batches fit in the first level there is no other.
    assert levels_above(tuple(firsts), firsts, firsts) == []


def test_nearly_filled():
    sizes, first = BlockSizes(140, 300, (5,)), BlockSizes(100, 300, (4,))
    assert not nearly_filled(sizes, BlockSizes(130, 300, (4,)), first)
    assert nearly_filled(sizes, BlockSizes(131, 300, (4,)), first)
    assert nearly_filled(sizes, BlockSizes(90, 200, (5,)), first)


@pytest.mark.long
@pytest.mark.little_effort
def test_a_run_finds_the_program_of_its_next_size(train_step, tmp_path, monkeypatch):
    """A step that takes a level which the thread compiled compiles nothing."""
    # Offloaded: the slots, too, have another size.
    step = train_step((1, 1, 1), **SIZES | {"train.steps": 6, "tables.resident_rows": 512})
    small, large = (
        ReadSizes((("stem", BlockSizes(*numbers)),)) for numbers in ((200, 200), (232, 224))
    )
    # The fourth batch and those behind it need more.
    needed = itertools.chain([small] * 3 + [large] * 3, itertools.repeat(small))
    monkeypatch.setattr(step.reads, "sizes_for", lambda batch, demand: next(needed))
    monkeypatch.setattr(step.reads, "larger_sizes", lambda *args, near: [large])
    monkeypatch.setattr(levels_ahead, "_FIRST_STEPS", 0)
    compiled, during = [], []

    class Watched(LevelsAhead):
        def await_step(self, ready):
            super().await_step(ready)
            compiled.clear()

        def after_step(self, state, ready, schedule):
            during.append((ready.sizes, len(compiled)))
            super().after_step(state, ready, schedule)

    def listen(event, seconds, **_):
        if event == COMPILED:
            ahead = threading.current_thread().name == "levels-ahead"
            (on_thread if ahead else compiled).append(event)

    on_thread = []
    monkeypatch.setattr("stem_jax.training.loop.LevelsAhead", Watched)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run(step, tmp_path)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert [sizes for sizes, _ in during] == [small] * 3 + [large] * 3
    assert [number > 0 for _, number in during] == [True] + [False] * 5
    assert len(on_thread) == 1 and not background.under_way()


def test_what_describes_an_array_is_what_the_step_takes(train_step):
    committed = jax.device_put(1.0, jax.devices()[1])
    for array in (committed, jax.numpy.int32(2), jax.numpy.asarray(2.0) * 1):
        described = levels_ahead._described(array)
        assert (described.shape, described.dtype) == (array.shape, array.dtype)
        assert described.sharding == (array.sharding if array.committed else None)
        assert described.weak_type == array.aval.weak_type
