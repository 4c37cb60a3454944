"""Greedy decoding with a share of the table's rows on the device against all, interleaved.

python -m benchmarks.decode [--shape=cpu|toy] [--resident=0.1] [--rounds=5]

The model of benchmarks.train_step with random parameters, a batch of four prompts of 64 tokens, 64
new tokens each; `toy` is a smaller one. Each new token's row is fetched when the token is known.
"""

import argparse
import itertools
import json
import platform
import statistics

import jax
import numpy as np

from benchmarks.interleave import interleave, speed_ratio
from benchmarks.offload import offloaded
from benchmarks.train_step import bench_config, toy_config, zipf_tokens
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling
from stem_jax.memory.catalogue import table_specs
from stem_jax.mesh import make_mesh
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.offloaded_rows import OffloadedRows
from stem_jax.tables.row_source import ResidentRows
from stem_jax.training.blueprint import Blueprint
from stem_jax.training.state import init_state, table_key

_PROMPT, _NEW = 64, 64


class Decoding:
    """Completes the next prompts and waits for their tokens, which it keeps."""

    def __init__(self, generator: Generator):
        self._generator = generator
        self._seeds = itertools.count()
        self.tokens: list[list[int | None]] = []

    def __call__(self) -> None:
        prompts = zipf_tokens(self._generator.config, next(self._seeds))[:, :_PROMPT]
        self.tokens += self._generator.steps(prompts.tolist(), _NEW, Sampling(temperature=0.0))


def main() -> None:
    """Runs the benchmark and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("toy", "cpu"), default="cpu")
    parser.add_argument("--resident", type=float, default=0.1, help="share of the rows")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    make = toy_config if args.shape == "toy" else bench_config
    config = make(model__stem_layers="half", mesh__data=1)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state = init_state(Blueprint(config, mesh))
    few = table_specs(offloaded(config, args.resident, prefetch=0))["stem"]
    store = HostStore.create(few, table_key(config), mesh, moments=False)
    sources = {
        "resident": ResidentRows(state.tables["stem"].rows, table_specs(config)["stem"], mesh),
        "offloaded": OffloadedRows(store, mesh, config.tables.cache_policy),
    }
    tokenizer = load_tokenizer("bytes")
    decoding = {
        name: Decoding(Generator(config, state.params, {"stem": rows}, tokenizer, mesh))
        for name, rows in sources.items()
    }
    seconds = interleave(decoding, args.rounds)
    same = decoding["resident"].tokens == decoding["offloaded"].tokens
    step = {name: statistics.median(times) / _NEW for name, times in seconds.items()}
    result = {
        "milliseconds_per_token": {name: round(1e3 * value, 3) for name, value in step.items()},
        "offloaded_over_resident": round(speed_ratio(seconds, "resident", "offloaded"), 3),
        "same_tokens": same,
        "distinct_tokens": len(np.unique(np.asarray(decoding["resident"].tokens, float))),
        "resident_share": args.resident,
        "rounds": args.rounds,
        "device": jax.devices()[0].device_kind,
        "machine": platform.processor() or platform.machine(),
        "jax": jax.__version__,
    }
    print(json.dumps(result, indent=2))
    sources["offloaded"].close()


if __name__ == "__main__":
    main()
