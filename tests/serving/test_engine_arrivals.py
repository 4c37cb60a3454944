"""Requests that come and go at random: each gets what it gets alone."""

import dataclasses
import functools
import itertools
import math
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling
from stem_jax.memory.catalogue import table_specs
from stem_jax.serving import prompt_parts
from stem_jax.serving.engine import Engine
from stem_jax.serving.request import Request
from stem_jax.tables.row_source import ResidentRows
from stem_jax.training.blueprint import Blueprint
from stem_jax.training.state import init_state
from tests.engine_requests import Heard, alone

CONTEXT, V = 64, 258
BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def parts(tiny_config, device_mesh):
    sizes = {"vocab_size": V, "num_layers": 2, "stem_layers": (1,)}
    config = tiny_config(
        **{f"model.{name}": size for name, size in sizes.items()},
        **{"train.seq_len": CONTEXT, "mesh.data": 1},
    )
    mesh = device_mesh((1, 1, 1))
    state = init_state(Blueprint(config, mesh))
    params = {name: 3 * value for name, value in state.params.items()}
    rows = ResidentRows(state.tables["stem"].rows, table_specs(config)["stem"], mesh)
    return config, params, {"stem": rows}, BYTES, mesh


@pytest.fixture(scope="module")
def expected(parts):
    generator = Generator(*parts)
    return functools.cache(lambda request: alone(generator, request))


@pytest.fixture(scope="module", params=[512, 16], ids=["whole", "in parts"])
def engine(parts, request):
    """Prompts are read whole, or 16 tokens at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_parts, "_MOST_TOKENS", request.param)
        patch.setattr("stem_jax.serving.engine._SMALLEST_WINDOW", 16)
        engine = Engine(*parts, slots=3, queue=64)
        engine.start()
        assert engine._windows() == [16, CONTEXT]
        yield engine
    engine.close()
    assert engine.failure is None


@dataclasses.dataclass(frozen=True)
class Arrival:
    """waits: until the one before it has been told something. cancels: after so many tokens."""

    request: Request
    waits: bool
    cancels: int | None


class Leaving(Heard):
    """Cancels after so many tokens."""

    def __init__(self, arrival):
        super().__init__()
        self.arrival, self.ticket, self.begun = arrival, None, threading.Event()

    def __call__(self, step):
        super().__call__(step)
        self.begun.set()
        if len(self.steps) == self.arrival.cancels and self.ticket is not None:
            self.ticket.cancel()


_requests = st.builds(
    Request,
    prompt_ids=st.lists(st.integers(0, V - 1), min_size=1, max_size=CONTEXT - 1).map(tuple),
    max_new_tokens=st.integers(1, 24),
    sampling=st.builds(
        Sampling,
        st.sampled_from([0.0, 0.7, 5.0]),
        st.sampled_from([0, 7]),
        st.sampled_from([1.0, 0.8]),
    ),
    seed=st.integers(0, 2**32 - 1),
    top_logprobs=st.sampled_from([None, None, 0, 2]),
)
_arrivals = st.builds(Arrival, _requests, st.booleans(), st.none() | st.none() | st.integers(1, 12))


@given(arrivals=st.lists(_arrivals, min_size=2, max_size=9))
@settings(max_examples=15)
def test_each_gets_what_it_gets_alone(engine, expected, arrivals):
    heard = []
    for arrival in arrivals:
        if arrival.waits and heard:
            assert heard[-1].begun.wait(300)
        heard.append(Leaving(arrival))
        heard[-1].ticket = engine.submit(arrival.request, heard[-1])
    for arrival, ears in zip(arrivals, heard, strict=True):
        tokens, whole = ears.tokens(), expected(arrival.request)
        if ears.finish == "cancelled":
            assert arrival.cancels is not None and len(tokens) > arrival.cancels
            assert tokens[:-1] == whole[: len(tokens) - 1]
            # At the next step, or the one after, which is under way.
            assert len(tokens) - 1 <= arrival.cancels + 2
        else:
            assert tokens == whole
            number = arrival.request.top_logprobs
            assert {len(step.top) for step in ears.steps} == {number or 0}
            assert {math.isnan(step.logprob) for step in ears.steps} == {number is None}
    stats = engine.stats()
    assert stats["compiled_programs"] == len(engine._parts.shapes()) + len(engine._windows())


def test_long_prompts_do_not_stop_the_others(engine, expected, monkeypatch):
    """Between two steps of the others at most one part is read."""
    calls = []

    def recorded(name):
        call = getattr(engine, name)
        return lambda *args: calls.append(name) or call(*args)

    for name in ("_read", "_step"):
        monkeypatch.setattr(engine, name, recorded(name))
    first, begun = Heard(), threading.Event()

    def short(step):
        first(step)
        begun.set()

    request = Request((1, 2, 3), 40, Sampling(temperature=0.0))
    long, last = Request(tuple(range(47)), 1, Sampling(temperature=0.0)), Heard()
    engine.submit(request, short)
    assert begun.wait(300)
    engine.submit(long, last)
    assert last.tokens() == expected(long)
    assert first.tokens() == expected(request)
    after = calls[calls.index("_step") :]
    # 47 tokens are one part, or three of 16.
    assert after.count("_read") == -(-47 // engine._parts.longest)
    assert ("_read", "_read") not in itertools.pairwise(after)
