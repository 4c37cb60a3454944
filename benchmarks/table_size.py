"""The table's part of a step, and a start, against the number of keys that a table has.

python -m benchmarks.table_size [--keys 100000 1000000 10000000] [--rounds=20] [--new]

An offloaded table of hashed keys, rows of 128 in bfloat16 with rowwise moments, on one device. Each
step asks for 16,384 distinct keys, drawn uniformly: finds them, brings their rows, exchanges them
there and back and updates them; no look-ahead hides anything. Every row was written once before;
with --new none was, and most are made as they are asked for. Tables take turns; the ratios are to
the table of the fewest keys, over pairs of steps. Memory is what a table added to the process.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.interleave import interleave, ratio_range, speed_ratio
from stem_jax.config import MeshConfig
from stem_jax.mesh import make_mesh
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.layout import TableLayout
from stem_jax.tables.prefetch import Prefetch
from stem_jax.tables.sharded_table import ShardedTable
from stem_jax.tables.spec import ROWWISE, TableSpec, TableState
from stem_jax.tables.update_history import make_history

WIDTH, ROWS = 128, 16384
RESIDENT = 40192
STEPS = 10_000
# Rows that are written at a time before the first step.
_PIECE = 2**16


class SizedTable:
    """Steps of an offloaded table alone; calling it makes one and waits for it."""

    def __init__(self, num_keys: int, resident: int, new: bool = True):
        self._mesh = make_mesh(MeshConfig(1, 1, 1, 1, 16.0), jax.devices()[:1])
        self._spec = TableSpec(
            layout=TableLayout(num_keys, 256, spread=True),
            vectors=1,
            width=WIDTH,
            init_std=0.02,
            vocab_axes=("data", "fsdp"),
            optimizer="deferred_adamw",
            lr_multiplier=5.0,
            weight_decay=0.0,
            beta1=0.9,
            beta2=0.95,
            epsilon=1e-8,
            clip_norm=1.0,
            capacity=None,
            resident_rows=resident,
            row_format="bfloat16",
            moments=ROWWISE,
        )
        before, start = anonymous_bytes(), time.perf_counter()
        store = HostStore.create(self._spec, jax.random.key(0), self._mesh)
        made = time.perf_counter()
        if not new:
            _write_all(store)
        written = time.perf_counter()
        self._prefetch = Prefetch(self._mesh, store, "lfu", ahead=1)
        self._state = self._prefetch.load()
        jax.block_until_ready(self._state)
        slots = time.perf_counter() - written
        self.start = {"store": made - start, "written": written - made, "slots": slots}
        self.start_bytes = anonymous_bytes() - before
        self.parts: dict[str, list[float]] = {}
        self._table = ShardedTable(self._spec, self._mesh, ROWS)
        self._history = jax.tree.map(jnp.asarray, make_history(self._spec, np.full(STEPS, 1e-3)))
        self._demand = jax.jit(lambda keys: self._table.demand(keys, jnp.ones(keys.shape, bool)))
        self._update = jax.jit(self._updated, donate_argnums=0)
        self._rng = np.random.default_rng(0)
        self._number = 0

    def __call__(self) -> None:
        keys = distinct_keys(self._rng, self._spec.layout.num_keys)
        times = [time.perf_counter()]

        def done(part: str):
            times.append(time.perf_counter())
            self.parts.setdefault(part, []).append(times[-1] - times[-2])

        demand = jax.block_until_ready(self._demand(keys))
        done("demand")
        asked = self._table.asked_by(demand)
        assert asked is not None
        done("asked")
        ticket = self._prefetch.ticket(asked)
        done("books")
        self._state = jax.block_until_ready(self._prefetch.apply(self._state, ticket))
        done("swap")
        slots = self._prefetch.slots(ticket, self._table.exchange.owned_rows)
        number = jnp.int32(self._number)
        self._state = self._update(self._state, keys, slots, number, self._history)
        jax.block_until_ready(self._state)
        done("update")
        ticket.returned.result()
        done("return")
        self._number += 1

    def close(self) -> None:
        """Ends the threads."""
        self._prefetch.close()

    def _updated(self, arrays, keys, slots, number, history):
        state = TableState(**arrays)
        requests = self._table.request(keys, jnp.ones(keys.shape, bool), slots)
        block = self._table.fetch(state, requests, jnp.float32, number, history)
        # A gradient that the compiler cannot see through, of the shape of a real one.
        sums = self._table.push(jnp.sin(block), requests)
        finite = self._table.norm(sums) < 1e30
        return vars(self._table.update(state, requests, sums, number, finite, history))


def main() -> None:
    """Runs the benchmark and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--resident", type=int, default=RESIDENT, help="rows on the device")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--new", action="store_true", help="no row was written before")
    args = parser.parse_args()
    tables, found = {}, {}
    # What every process pays once belongs to none of them.
    SizedTable(2 * args.resident, args.resident).close()
    for num_keys in sorted(args.keys):
        tables[str(num_keys)] = table = SizedTable(num_keys, args.resident, args.new)
        found[str(num_keys)] = {
            "start_seconds": {part: round(took, 3) for part, took in table.start.items()},
            "start_mib": round(table.start_bytes / 2**20, 1),
        }
    seconds = interleave(tables, args.rounds)
    fewest = str(min(args.keys))
    for name, table in tables.items():
        of_parts = {part: statistics.median(times[1:]) for part, times in table.parts.items()}
        found[name] |= {
            "step_seconds": round(statistics.median(seconds[name]), 5),
            "of_that": {part: round(median, 5) for part, median in of_parts.items()},
            "ratio": round(speed_ratio(seconds, fewest, name), 3),
            "ratio_90%": [round(edge, 3) for edge in ratio_range(seconds, fewest, name)],
        }
        table.close()
    result = {"tables": found, "process_mib": round(anonymous_bytes() / 2**20, 1)}
    result |= {"rounds": args.rounds, "new": args.new, "device": jax.devices()[0].device_kind}
    print(json.dumps(result | {"jax": jax.__version__}, indent=2))


def _write_all(store: HostStore) -> None:
    """Writes every row once, with numbers that no optimizer minds."""
    [block] = store.blocks
    arrays = block.arrays.items()
    values = {
        n: np.full((_PIECE, *a.shape[1:]), 0.01, np.float32).astype(a.dtype) for n, a in arrays
    }
    for first in range(0, len(block.row_range), _PIECE):
        rows = np.arange(first, min(first + _PIECE, len(block.row_range)))
        store.write(block, np.random.default_rng(first).permutation(rows), values)


def distinct_keys(rng: np.random.Generator, num_keys: int) -> np.ndarray:
    """[1, 1, n] int32 distinct keys, at a cost that no table's size enters."""
    keys = np.unique(rng.integers(0, num_keys, 2 * ROWS, np.int32))
    return rng.permutation(keys)[:ROWS].reshape(1, 1, -1)


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


if __name__ == "__main__":
    main()
