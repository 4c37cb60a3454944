"""Continuous and static batches of the same requests, interleaved, all programs compiled before.

256 prompts of 8 to 64 tokens, outputs uniform over 8 to 128, greedy, all there at the start, the
same number of sequences at a time. A static batch ends with its longest output, as in `generate`.
Then a step of the engine against one of the generator, all sequences of one length; and the engine
again with as many requests, to see whether its memory grows.
"""

import argparse
import gc
import itertools
import os
import platform
import statistics
import threading
from typing import Any

import jax
import numpy as np
import psutil

from benchmarks.interleave import interleave, ratio_range, speed_ratio
from benchmarks.train_step import bench_config, random_params, toy_config
from stem_jax.config import Config
from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling
from stem_jax.kept_memory import LARGE_PAGES
from stem_jax.memory.catalogue import table_specs
from stem_jax.mesh import make_mesh
from stem_jax.serving.engine import Engine
from stem_jax.serving.request import Request, Step
from stem_jax.tables.row_source import ResidentRows
from stem_jax.tables.spec import init_table
from stem_jax.training.blueprint import Blueprint
from stem_jax.training.state import table_key

_PROMPT, _OUTPUT, _STEPS = (8, 64), (8, 128), 64


def small_config(**overrides) -> Config:
    """A model whose steps take a CPU longer than the host's part in them."""
    sizes = {"vocab_size": 8192, "embed_dim": 256, "num_layers": 4, "num_heads": 4}
    sizes |= {"num_kv_heads": 4, "ffn_dim": 768}
    return bench_config(**{f"model__{name}": size for name, size in sizes.items()} | overrides)


SHAPES = {"toy": toy_config, "small": small_config, "cpu": bench_config}


def requests(number: int, vocab: int, sampling: Sampling, seed: int = 0) -> list[Request]:
    """Prompts of zipfian ids, each with the length of its output."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, vocab + 1)
    weights /= weights.sum()
    found = []
    for length, output in zip(
        rng.integers(_PROMPT[0], _PROMPT[1] + 1, number),
        rng.integers(_OUTPUT[0], _OUTPUT[1] + 1, number),
    ):
        prompt = rng.choice(vocab, length, p=weights)
        found.append(Request(tuple(prompt.tolist()), int(output), sampling, len(found)))
    return found


class Static:
    """Batch after batch, each until its longest output is done."""

    def __init__(self, generator: Generator, asked: list[Request], slots: int):
        self._generator, self._asked, self._slots = generator, asked, slots
        self.tokens: list[list[int]] = []

    def __call__(self) -> None:
        self.tokens = []
        for first in range(0, len(self._asked), self._slots):
            batch = self._asked[first : first + self._slots]
            most = max(request.max_new_tokens for request in batch)
            prompts = [request.prompt_ids for request in batch]
            seeds = [request.seed for request in batch]
            drawn = list(self._generator.steps(prompts, most, batch[0].sampling, seeds))
            for request, tokens in zip(batch, zip(*drawn, strict=True), strict=True):
                self.tokens.append(list(tokens[: request.max_new_tokens]))


class Continuous:
    """All requests at once to the engine."""

    def __init__(self, engine: Engine, asked: list[Request]):
        self._engine, self._asked = engine, asked
        self.tokens: list[list[int]] = []

    def __call__(self) -> None:
        self.tokens = [[] for _ in self._asked]
        left, done = itertools.count(1), threading.Event()

        def hear(number: int, step: Step) -> None:
            assert step.finish in (None, "length"), step
            self.tokens[number].append(step.token)
            if step.finish is not None and next(left) == len(self._asked):
                done.set()

        for number, request in enumerate(self._asked):
            self._engine.submit(request, lambda step, number=number: hear(number, step))
        assert done.wait(3600)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures, and what they were measured with.

    Args:
        args: flags of `benchmarks.serving`.
    """
    sizes = {"model__stem_layers": "half", "mesh__data": 1, "train__seq_len": args.context}
    config = SHAPES[args.shape](**sizes)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    blueprint = Blueprint(config, mesh)
    rows = {
        name: ResidentRows(init_table(spec, table_key(config, name), mesh).rows, spec, mesh)
        for name, spec in table_specs(config).items()
    }
    # No tokenizer, so that no stop id ends an output.
    model = config, random_params(blueprint.model), rows, None, mesh
    generator, engine = Generator(*model), Engine(*model, slots=args.slots, queue=args.requests)
    engine.start()
    sampling = Sampling() if args.sampled else Sampling(temperature=0.0)
    asked = requests(args.requests, config.model.vocab_size, sampling)
    batches = {
        "static": Static(generator, asked, args.slots),
        "continuous": Continuous(engine, asked),
    }
    work: dict[str, list[float]] = {}
    seconds = interleave(batches, args.rounds, work)
    same = sum(a == b for a, b in zip(batches["static"].tokens, batches["continuous"].tokens))
    even = [Request(request.prompt_ids[:8], _STEPS, sampling, 1) for request in asked[: args.slots]]
    steps = {"generator": Static(generator, even, args.slots), "engine": Continuous(engine, even)}
    work_of_a_step: dict[str, list[float]] = {}
    of_a_step = interleave(steps, 4 * args.rounds, work_of_a_step)
    compiled = engine.stats()["compiled_programs"]
    process, memory = psutil.Process(), []
    for _ in range(3):
        batches["continuous"]()
        gc.collect()
        memory.append(process.memory_info().rss / 2**20)
    tokens = sum(request.max_new_tokens for request in asked)
    rate = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    result = {
        "tokens_per_second": {name: round(value, 1) for name, value in rate.items()},
        "continuous_over_static": round(speed_ratio(seconds, "continuous", "static"), 3),
        "range": [round(value, 3) for value in ratio_range(seconds, "continuous", "static")],
        "continuous_over_static_by_cpu_time": round(speed_ratio(work, "continuous", "static"), 3),
        "same_outputs": f"{same} of {len(asked)}",
        "milliseconds_per_step": {
            name: round(1e3 * statistics.median(times) / _STEPS, 2)
            for name, times in of_a_step.items()
        },
        "engine_step_over_generator": round(speed_ratio(of_a_step, "generator", "engine"), 3),
        "engine_step_over_generator_by_cpu_time": round(
            speed_ratio(work_of_a_step, "generator", "engine"), 3
        ),
        "rss_mib_after_more": [round(value, 1) for value in memory],
        "compiled_programs": compiled,
        "compiled_since": engine.stats()["compiled_programs"] - compiled,
        **vars(args),
        "device": jax.devices()[0].device_kind,
        "large_pages": LARGE_PAGES.items() <= os.environ.items(),
        "machine": platform.processor() or platform.machine(),
        "jax": jax.__version__,
    }
    engine.close()
    return result
