"""Cost of the table's part of a step against the size of the table and the rows of a batch.

python -m benchmarks.table_step [--rounds=7]

Requests, fetch, push, norm and optimizer update of one step, S 2, F 256, on one device. First the
vocabulary grows at a fixed batch, then the batch at a fixed vocabulary; deferred AdamW against lazy
at the same shape. Interleaved; ratios are medians over rounds.
"""

import argparse
import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.interleave import interleave, speed_ratio
from stem_jax.config import MeshConfig
from stem_jax.mesh import make_mesh
from stem_jax.tables.layout import TableLayout
from stem_jax.tables.sharded_table import ShardedTable
from stem_jax.tables.spec import TableSpec, init_table
from stem_jax.tables.update_history import make_history

LAYERS, WIDTH = 2, 256
STEPS = 10_000


class TableStep:
    """One optimizer step of a table alone; calling it makes one update and waits for it."""

    def __init__(self, vocab: int, rows: int, optimizer: str = "deferred_adamw"):
        mesh = make_mesh(MeshConfig(1, 1, 1, 1, 16.0), jax.devices()[:1])
        spec = TableSpec(
            layout=TableLayout(vocab, 256),
            vectors=LAYERS,
            width=WIDTH,
            init_std=0.01,
            vocab_axes=("data", "fsdp"),
            optimizer=optimizer,
            lr_multiplier=1.0,
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.95,
            epsilon=1e-8,
            clip_norm=1.0,
            capacity=None,
        )
        table = ShardedTable(spec, mesh, rows)
        self.state = init_table(spec, jax.random.key(0), mesh)
        history = jax.tree.map(jnp.asarray, make_history(spec, np.full(STEPS, 1e-3)))

        def step(state, keys_AxBxL, number, history):
            valid = jnp.ones(keys_AxBxL.shape, bool)
            requests = table.request(keys_AxBxL, valid)
            block = table.fetch(state, requests, jnp.float32, number, history)
            # A gradient that the compiler cannot see through, of the shape of a real one.
            sums = table.push(jnp.sin(block), requests)
            norm = jnp.sqrt(jnp.sum(sums**2))
            sums *= jnp.minimum(1.0, 1.0 / norm)
            return table.update(state, requests, sums, number, norm < 1e30, history)

        self.program = jax.jit(step, donate_argnums=0)
        self.history = history
        self._rng = np.random.default_rng(0)
        self._vocab, self._rows, self._number = vocab, rows, 0

    def __call__(self) -> None:
        # Other rows each time: the same ones would stay in the cache and never lag behind.
        keys = self._rng.choice(self._vocab, self._rows, replace=False).astype(np.int32)
        number = jnp.int32(self._number)
        self.state = self.program(self.state, keys.reshape(1, 1, -1), number, self.history)
        jax.block_until_ready(self.state)
        self._number += 1


def main() -> None:
    """Runs the benchmark and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    by_vocab = {f"V {vocab}": TableStep(vocab, 4096) for vocab in (32768, 131072, 524288)}
    by_vocab["lazy, V 32768"] = TableStep(32768, 4096, "lazy_adamw")
    seconds = interleave(by_vocab, args.rounds)
    result = {
        "seconds_by_vocab": _medians(seconds),
        "v512k_over_v32k": round(speed_ratio(seconds, "V 32768", "V 524288"), 3),
        "deferred_over_lazy": round(speed_ratio(seconds, "lazy, V 32768", "V 32768"), 3),
    }
    del by_vocab
    sizes = (256, 1024, 4096, 16384)
    seconds = interleave({str(rows): TableStep(131072, rows) for rows in sizes}, args.rounds)
    result["microseconds_per_row"] = {
        rows: round(1e6 * median / int(rows), 2) for rows, median in _medians(seconds).items()
    }
    result |= {"rounds": args.rounds, "device": jax.devices()[0].device_kind}
    print(json.dumps(result | {"jax": jax.__version__}, indent=2))


def _medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(times), 5) for name, times in seconds.items()}


if __name__ == "__main__":
    main()
