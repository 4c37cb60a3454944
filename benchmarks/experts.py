"""Time of a hash layer beside a dense FFN, forward and backward, on this machine.

python -m benchmarks.experts [--rounds=40]

4,096 tokens of the documentation of the running Python, by a tokenizer trained on it; F is 3 D. The
two take turns, so that what else the machine does meets both; seconds are those of the processor
and of the clock, ratios medians over the rounds, each of one after the other.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from configs.base import get_config
from stem_jax.config import ModelConfig
from stem_jax.config_file import build
from stem_jax.data.corpora import read_corpus
from stem_jax.data.sentencepiece_training import train_sentencepiece
from stem_jax.data.tokenizer import load_tokenizer
from stem_jax.model.feed_forward import KINDS
from stem_jax.model.kind import Read

_TOKENS, _VOCABULARY = 4096, 4096
_CLOCKS = {"processor": time.process_time, "clock": time.perf_counter}


def main() -> None:
    """Runs the benchmark and prints a JSON object for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    tokens_1xL = _tokens()
    base = build(get_config().to_dict()).model
    for width in (64, 128):
        for experts in (16, 22):
            sizes = {"embed_dim": width, "ffn_dim": 3 * width, "hash_moe_experts": experts}
            model = dataclasses.replace(base, vocab_size=_VOCABULARY, **sizes)
            print(json.dumps(sizes | _measure(model, tokens_1xL, args.rounds)), flush=True)


def _tokens() -> jax.Array:
    documents = list(read_corpus("pydoc"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        train_sentencepiece(documents, path, _VOCABULARY)
        tokenizer = load_tokenizer("sentencepiece", path)
    ids: list[int] = []
    for document in documents:
        ids += tokenizer.encode(document)
        if len(ids) >= _TOKENS:
            break
    return jnp.array([ids[:_TOKENS]], jnp.int32)


def _measure(model: ModelConfig, tokens_1xL: jax.Array, rounds: int) -> dict:
    x_1xLxD = jax.random.normal(jax.random.key(0), (*tokens_1xL.shape, model.embed_dim))
    read = Read(tokens_1xL, jnp.ones_like(tokens_1xL))
    runs = {kind: _gradients(kind, model, read) for kind in ("dense", "hash_moe")}
    seconds = {(kind, clock): [] for kind in runs for clock in _CLOCKS}
    for number in range(rounds + 2):
        for kind, (run, state) in runs.items():
            starts = {name: now() for name, now in _CLOCKS.items()}
            jax.block_until_ready(run(state, x_1xLxD))
            for name, now in _CLOCKS.items():
                # The first two compile and warm up.
                if number > 1:
                    seconds[kind, name].append(now() - starts[name])
    found = {}
    for name in _CLOCKS:
        dense, hashed = seconds["dense", name], seconds["hash_moe", name]
        ratios = [one / other for one, other in zip(hashed, dense, strict=True)]
        found[name] = {
            "dense_ms": round(1e3 * statistics.median(dense), 2),
            "hash_moe_ms": round(1e3 * statistics.median(hashed), 2),
            "ratio": round(statistics.median(ratios), 3),
            "fastest_ratio": round(min(hashed) / min(dense), 3),
        }
    return found


def _gradients(kind: str, model: ModelConfig, read: Read):
    graph, state = nnx.split(KINDS[kind](model, 1.0, None, rngs=nnx.Rngs(0)))

    @jax.jit
    def run(state, x_1xLxD):
        def total(state, x_1xLxD):
            return jnp.sum(jnp.square(nnx.merge(graph, state)(x_1xLxD, read)[0]))

        return jax.grad(total, argnums=(0, 1))(state, x_1xLxD)

    return run, state


if __name__ == "__main__":
    main()
