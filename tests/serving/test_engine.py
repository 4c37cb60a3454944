"""Continuous batching: each request gets what it gets alone, whatever else is in the batch."""

import dataclasses
import gc
import logging
import math
import random
import threading

import jax
import numpy as np
import psutil
import pytest

from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.errors import InputError
from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling
from stem_jax.memory.catalogue import table_specs
from stem_jax.model.cache import NewCache
from stem_jax.serving.engine import Engine
from stem_jax.serving.request import MAX_LOGPROBS, NotServing, QueueFull, Request
from stem_jax.tables.row_source import ResidentRows
from stem_jax.training.blueprint import Blueprint
from stem_jax.training.state import init_state
from tests.engine_requests import Heard, alone

pytestmark = pytest.mark.little_effort

CONTEXT = 48
BYTES = load_tokenizer("bytes")
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def parts(tiny_config, device_mesh):
    """What a Generator and an Engine take."""
    config = tiny_config(
        **{
            "model.vocab_size": 258,
            "model.num_layers": 2,
            "model.stem_layers": (1,),
            "train.seq_len": CONTEXT,
            "mesh.data": 1,
        }
    )
    mesh = device_mesh((1, 1, 1))
    state = init_state(Blueprint(config, mesh))
    params = {name: 3 * value for name, value in state.params.items()}
    rows = ResidentRows(state.tables["stem"].rows, table_specs(config)["stem"], mesh)
    return config, params, {"stem": rows}, BYTES, mesh


@pytest.fixture(scope="module")
def generator(parts):
    return Generator(*parts)


@pytest.fixture(scope="module")
def engine(parts):
    engine = Engine(*parts, slots=3, queue=4)
    engine.start()
    yield engine
    engine.close()


@pytest.fixture
def own_engine(parts):
    """own_engine(**sizes): one that a test may break; not started."""
    engines = []

    def make(**sizes):
        engines.append(Engine(*parts, **({"slots": 1, "queue": 2} | sizes)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def test_tokens_are_those_of_each_alone(engine, generator):
    rng = random.Random(0)
    requests = []
    for number in range(7):
        prompt = tuple(rng.randrange(258) for _ in range(rng.choice([1, 5, 16, 17, 33, 40])))
        sampling = GREEDY if number % 3 == 0 else Sampling(3.0, rng.choice([0, 20]), 0.9)
        requests.append(Request(prompt, rng.randrange(1, 20), sampling, rng.randrange(2**32)))
    heard = [Heard() for _ in requests]
    for request, ears in zip(requests, heard, strict=True):
        engine.submit(request, ears)
    for request, ears in zip(requests, heard, strict=True):
        assert ears.tokens() == alone(generator, request)
        last = ears.steps[-1]
        assert last.finish == ("stop" if last.token in BYTES.special.stop_ids else "length")


def test_nothing_compiles_after_the_start(engine):
    compiled = []

    def listen(event, *_, **__):
        if "compile" in event:
            compiled.append(event)

    before = engine.stats()["compiled_programs"]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        heard = []
        for length in (1, 16, 17, 47, 3, 9, 30):
            how = Sampling(1.5, length, 0.9) if length % 2 else GREEDY
            request = Request((7,) * length, 5, how, top_logprobs=length % 3)
            heard.append(Heard())
            engine.submit(request, heard[-1])
        assert all(len(ears.tokens()) >= 1 for ears in heard)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []
    assert engine.stats()["compiled_programs"] == before > 0


def test_a_stop_id_ends_a_request_and_no_other(engine, generator):
    request = Request((3, 4, 5), 12, GREEDY)
    free = alone(generator, request)
    stop = free[4]
    heard = [Heard(), Heard()]
    engine.submit(dataclasses.replace(request, stop_ids=(stop,)), heard[0])
    engine.submit(request, heard[1])
    assert heard[0].tokens() == free[: free.index(stop) + 1]
    assert heard[0].finish == "stop"
    assert heard[1].tokens() == free


def test_log_probabilities_are_those_of_the_model(engine, generator, parts):
    params, rows = parts[1], generator.rows.sources
    prompt = (3, 100, 7, 8)
    cold, hot = Heard(), Heard()
    engine.submit(Request(prompt, 6, GREEDY, top_logprobs=MAX_LOGPROBS), cold)
    engine.submit(Request(prompt, 6, Sampling(3.0, 5, 1.0), 9, top_logprobs=2), hot)
    advance = jax.jit(generator.advance)
    for ears in (cold, hot):
        text = list(prompt)
        for token, step in zip(ears.tokens(), ears.steps, strict=True):
            tokens_BxL = np.pad(np.array([text], np.int32), ((0, 0), (0, 16 - len(text))))
            caches = [NewCache(16)] * generator.config.model.num_layers
            lengths_B = np.array([len(text)], np.int32)
            logits_V = np.asarray(advance(params, rows, tokens_BxL, lengths_B, caches)[0])[0]
            logprobs_V = logits_V - np.logaddexp.reduce(logits_V)
            number = 5 if ears is cold else 2
            best = np.argsort(-logprobs_V, kind="stable")[:number]
            assert [top[0] for top in step.top] == best.tolist()
            found = [step.logprob, *(value for _, value in step.top)]
            np.testing.assert_allclose(found, logprobs_V[[token, *best]], atol=1e-4, rtol=0)
            text.append(token)
    own, silent = Heard(), Heard()
    engine.submit(Request(prompt, 2, GREEDY, top_logprobs=0), own)
    engine.submit(Request(prompt, 2, GREEDY), silent)
    assert own.tokens() == silent.tokens()
    assert own.steps[0].top == () and own.steps[0].logprob == cold.steps[0].logprob
    assert silent.steps[0].top == () and math.isnan(silent.steps[0].logprob)


def test_a_full_queue_refuses_and_cancelled_requests_leave(own_engine, generator):
    engine = own_engine()
    with pytest.raises(NotServing, match="was not started"):
        engine.submit(Request((1,)), Heard())
    engine.start()
    begun, go_on = threading.Event(), threading.Event()
    first = Heard()

    def slow(step):
        first(step)
        begun.set()
        assert go_on.wait(60)

    running = engine.submit(Request((5,), 40, GREEDY), slow)
    assert begun.wait(60)
    second, third = Heard(), Heard()
    waiting = engine.submit(Request((6,), 40, GREEDY), second)
    engine.submit(Request((7,), 5, GREEDY), third)
    with pytest.raises(QueueFull) as full:
        engine.submit(Request((8,), 5, GREEDY), Heard())
    assert 1 <= full.value.retry_after <= 60
    with pytest.raises(QueueFull):
        engine.check_room()
    running.cancel()
    waiting.cancel()
    waiting.cancel()
    go_on.set()
    assert third.tokens() == alone(generator, Request((7,), 5, GREEDY))
    assert [step.finish for step in second.steps] == ["cancelled"]
    assert math.isnan(second.steps[0].logprob) and second.steps[0].token == -1
    assert first.finish == "cancelled" and 1 < len(first.steps) < 10
    assert engine.drain(60)
    running.cancel()
    stats = engine.stats()
    assert (stats["requests_total_cancelled"], stats["requests_total_length"]) == (2, 1)
    assert (stats["running"], stats["waiting"], stats["slots"]) == (0, 0, 1)
    with pytest.raises(NotServing, match="shut down"):
        engine.submit(Request((8,)), Heard())


def test_requests_are_taken_together_or_not_at_all(own_engine):
    engine = own_engine(slots=1, queue=2)
    engine.start()
    heard = [Heard() for _ in range(4)]
    asked = [(Request((5 + n,), 3, GREEDY), on_step) for n, on_step in enumerate(heard)]
    with pytest.raises(QueueFull):
        engine.submit_all(asked)
    assert engine.stats()["waiting"] == 0
    engine.check_room()
    assert len(engine.submit_all(asked[:3])) == 3
    assert all(len(one.tokens()) == 3 for one in heard[:3]) and not heard[3].steps
    engine.close()


def test_draining_ends_what_there_is_and_closing_cancels_it(own_engine):
    engine = own_engine()
    engine.start()
    heard = [Heard(), Heard()]
    for ears in heard:
        engine.submit(Request((5,), 6, GREEDY), ears)
    assert engine.drain(60) and not engine.ready
    assert [ears.finish for ears in heard] == ["length"] * 2
    other = own_engine()
    other.start()
    begun, ears = threading.Event(), Heard()

    def slow(step):
        ears(step)
        begun.set()

    other.submit(Request((5,), 47, GREEDY), slow)
    assert begun.wait(60)
    other.close()
    assert ears.finish == "cancelled"


def test_a_failure_ends_all_and_is_said(own_engine, caplog):
    engine = own_engine()
    engine.start()
    broken = RuntimeError("no device")

    def fail(*_, **__):
        raise broken

    engine._programs.decode = fail
    heard = [Heard(), Heard()]
    with caplog.at_level(logging.CRITICAL):
        engine.submit(Request((5,), 6, GREEDY), heard[0])
        assert heard[0].ended.wait(60)
    assert heard[0].finish == "error"
    assert engine.failure is broken and not engine.ready
    with pytest.raises(NotServing, match="no device"):
        engine.submit(Request((5,)), Heard())
    assert engine.drain(1)


def test_who_cannot_hear_is_dropped_alone(own_engine, generator, caplog):
    engine = own_engine()
    engine.start()

    def deaf(step):
        raise ValueError("gone")

    ears, request = Heard(), Request((5,), 9, GREEDY)
    with caplog.at_level(logging.CRITICAL):
        engine.submit(request, deaf)
        engine.submit(request, ears)
        assert ears.tokens() == alone(generator, request)
        assert engine.drain(60)
    assert engine.stats()["requests_total_error"] == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_ids": ()}, "prompt 1 has 0 tokens"),
        ({"prompt_ids": (1,) * CONTEXT}, "prompt 1 has 48 tokens"),
        ({"prompt_ids": (258,)}, "ids from 258 to 258, the model knows 0 to 257"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be"),
        ({"seed": 2**32}, "seed=4294967296 must be"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"top_logprobs": 6}, "top_logprobs=6 must be from 0 to 5"),
    ],
)
def test_refused_requests(engine, fields, message):
    with pytest.raises(InputError, match=message):
        engine.submit(Request(**({"prompt_ids": (1,)} | fields)), Heard())


def test_the_context_ends_a_request(engine, generator):
    request, ears = Request((5,) * (CONTEXT - 4), 100, GREEDY), Heard()
    engine.submit(request, ears)
    assert ears.tokens() == alone(generator, request)
    assert (len(ears.steps), ears.finish) == (4, "length")


def test_slots_that_are_none(parts):
    with pytest.raises(InputError, match="slots=0 must be at least 1"):
        Engine(*parts, slots=0)
    with pytest.raises(InputError, match="queue=-1 must be"):
        Engine(*parts, queue=-1)


@pytest.mark.long
def test_memory_does_not_grow(engine):
    """The process has no more after 900 requests than after 300."""
    rng, held = random.Random(1), []
    process = psutil.Process()
    for _ in range(3):
        for _ in range(75):
            heard = [Heard() for _ in range(4)]
            for ears in heard:
                prompt = tuple(rng.randrange(258) for _ in range(rng.randrange(1, 40)))
                how = Sampling(1.0, 20, 0.9) if rng.random() < 0.5 else GREEDY
                request = Request(prompt, rng.randrange(1, 12), how, top_logprobs=2)
                ticket = engine.submit(request, ears)
                if rng.random() < 0.2:
                    ticket.cancel()
            assert all(ears.tokens() for ears in heard)
        gc.collect()
        held.append(process.memory_info().rss)
    assert held[2] - held[0] <= 10 * 2**20
    assert not engine._under_way and not engine._books.running
