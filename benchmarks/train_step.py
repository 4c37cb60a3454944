"""A training step against compiled PyTorch, dense against STEM, interleaved in one run.

python -m benchmarks.train_step [--rounds=20]

D 512, 8 layers, 8 heads, F 1536, V 32000, batch 4 x 256, float32, untied head, AdamW with a global
clip. The opponents are those of `benchmarks.torch_steps`: LlamaForCausalLM, and the same with half
of its up projections replaced by embeddings.
"""

import argparse
import functools
import json
import os
import platform
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.interleave import interleave, ratio_range, speed_ratio
from configs.base import get_config as base_config
from stem_jax.config import Config
from stem_jax.config_file import build
from stem_jax.kept_memory import keep_freed_memory
from stem_jax.mesh import make_mesh
from stem_jax.training.batch import Batch
from stem_jax.training.blueprint import ModelDef, Params
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import init_state
from stem_jax.training.step import TrainStep

BATCH, LENGTH = 4, 256


def bench_config(**overrides) -> Config:
    """The benchmark's shape; keyword arguments are "section__key"."""
    raw = base_config().to_dict()
    raw["model"] |= {
        "vocab_size": 32000,
        "embed_dim": 512,
        "num_layers": 8,
        "num_heads": 8,
        "num_kv_heads": 8,
        "ffn_dim": 1536,
        "stem_layers": "none",
    }
    raw["train"] |= {"global_batch_size": BATCH, "seq_len": LENGTH}
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        raw[section][name] = value
    return build(raw)


def toy_config(**overrides) -> Config:
    """A model that shows that a benchmark runs, and measures nothing."""
    sizes = {"vocab_size": 2048, "embed_dim": 128, "num_layers": 2, "num_heads": 2}
    sizes |= {"num_kv_heads": 2, "ffn_dim": 96}
    small = {f"model__{name}": size for name, size in sizes.items()}
    # A batch asks for fewer rows than a quarter of the table has.
    return bench_config(**{**small, "train__seq_len": 128, **overrides})


def zipf_tokens(config: Config, seed: int = 0) -> np.ndarray:
    """Token ids [B, L + 1] with the frequencies of text: rank r has weight 1 / r."""
    vocab = config.model.vocab_size
    weights = 1 / np.arange(1, vocab + 1)
    shape = (config.train.global_batch_size, config.train.seq_len + 1)
    return np.random.default_rng(seed).choice(vocab, size=shape, p=weights / weights.sum())


@functools.partial(jax.jit, static_argnums=1)
def _random(key: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape.shape, shape.dtype)


def random_params(model: ModelDef) -> Params:
    """Parameters of the right shapes, made one by one.

    The configured ones are one program, which takes minutes to compile for a GPU at the 350M shape.
    """
    keys = jax.random.split(jax.random.key(0), len(model.shapes()))
    return {
        name: _random(key, shape) if len(shape.shape) > 1 else jnp.ones(shape.shape, shape.dtype)
        for key, (name, shape) in zip(keys, model.shapes().items(), strict=True)
    }


class JaxStep:
    """A train step that keeps its state; calling it makes one update and waits for it."""

    def __init__(self, config: Config):
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        self.programs = TrainStep(config, mesh)
        model = self.programs.model
        self.state = init_state(self.programs.blueprint, random_params(model))
        tokens = zipf_tokens(config)
        shape = (config.train.micro_batches, -1, config.train.seq_len)

        def place(array, dtype=jnp.int32):
            array = np.ascontiguousarray(array).reshape(shape)
            return jax.device_put(jnp.asarray(array, dtype), self.programs.batch_sharding)

        inputs = tokens[:, :-1]
        positions = np.broadcast_to(np.arange(inputs.shape[1]), inputs.shape)
        ones = np.ones(inputs.shape)
        self.batch = Batch(
            tokens=place(inputs),
            targets=place(tokens[:, 1:]),
            positions=place(positions),
            segment_ids=place(ones),
            loss_mask=place(ones, bool),
        )
        self.schedule = make_schedule(config, 10_000)
        reads = self.programs.reads
        demand = self.programs.demand(self.batch) if reads.memories else {}
        self.sizes = reads.sizes_for(self.batch, demand)

    def __call__(self) -> None:
        self.state, metrics = self.programs.update(
            self.state, self.batch, self.schedule, sizes=self.sizes
        )
        jax.block_until_ready((self.state, metrics))


def main() -> None:
    """Runs the benchmark and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    keep_freed_memory()
    # Idle torch threads would otherwise spin while JAX has its turn.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from benchmarks.torch_steps import TorchStep

    dense, stem = bench_config(), bench_config(model__stem_layers="half")
    tokens = zipf_tokens(dense)[:, :-1]
    contestants = {
        "torch": TorchStep(dense, tokens),
        "torch, STEM": TorchStep(stem, tokens),
        "dense": JaxStep(dense),
        "stem": JaxStep(stem),
        "stem, lazy": JaxStep(
            bench_config(model__stem_layers="half", tables__optimizer="lazy_adamw")
        ),
    }
    seconds = interleave(contestants, args.rounds)
    pairs = {
        "dense_over_torch": ("dense", "torch"),
        "stem_over_torch_stem": ("stem", "torch, STEM"),
        "stem_over_dense": ("stem", "dense"),
        "stem_deferred_over_lazy": ("stem", "stem, lazy"),
    }
    result = {
        "tokens_per_second": {
            name: round(tokens.size / statistics.median(times), 1)
            for name, times in seconds.items()
        },
        # Median, and what 90% of the rounds lie between.
        **{
            name: [round(x, 3) for x in (speed_ratio(seconds, *pair), *ratio_range(seconds, *pair))]
            for name, pair in pairs.items()
        },
        "rounds": args.rounds,
        "device": jax.devices()[0].device_kind,
        "machine": platform.processor() or platform.machine(),
        "jax": jax.__version__,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
