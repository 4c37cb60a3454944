"""Steps of a model whose table lies on disk for the most part, against one of few keys.

python -m benchmarks.table_disk [--keys=1000000] [--host-gib=0.04] [--rounds=6] [--folder=DIR]

The model of configs/ngram_tiny.py with rows of 128 in bfloat16 and rowwise moments; each step asks
for 16,384 distinct keys, drawn uniformly, and looks two batches ahead. Every row of the table was
written once before, a save of all is kept and the page cache dropped. Turns of some steps
alternate with those of the same model with 100,000 keys in memory, with as many records read
without training, as rows with their checksums, and as bytes. What a turn began to read it waits
for. The shape of a large run is `--keys=100000000 --host-gib=4`, which takes 30 GB of disk.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.filled_disk import fetched_bytes, filled
from benchmarks.interleave import interleave, ratio_range, speed_ratio
from benchmarks.table_size import ROWS, WIDTH, anonymous_bytes, distinct_keys
from benchmarks.train_step import random_params, zipf_tokens
from stem_jax.config_file import load_config
from stem_jax.memory.catalogue import with_eos
from stem_jax.memory.ngram import NGRAM
from stem_jax.mesh import make_mesh
from stem_jax.tables.data_files import DataFiles, places_of_a_file
from stem_jax.tables.disk_store import DiskStore
from stem_jax.tables.first_rows import FirstRows
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.prefetch import Prefetch
from stem_jax.tables.row_tiers import RowTiers
from stem_jax.tables.spec import TableState
from stem_jax.training.batch import Batch
from stem_jax.training.look_ahead import LookAhead
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import init_state, table_key
from stem_jax.training.step import TrainStep

_CONFIG = Path(__file__).parent.parent / "configs" / "ngram_tiny.py"
_HASHES = 8
_FEW = 100_000
# Rows of the batches in flight, three at a time.
_RESIDENT = 50_176
_STEPS = 100_000
_OF_ROWS = ("row_hit_rate", "host_rows_read", "disk_rows_read", "disk_rows_written")
_OF_ROWS += ("transfer_seconds", "stall_seconds")
# Of a checkpoint that is kept, the best, and the one that is being written.
_MOST_SAVES = 3


class Run:
    """Steps of a model; calling it makes some and waits for them and for what they read ahead."""

    def __init__(self, num_keys: int, steps: int, host_rows: int, disk: Path):
        begun = time.perf_counter()
        keys = {
            "ngram.keys_per_head": math.ceil(num_keys / _HASHES),
            "ngram.width": _HASHES * WIDTH,
            "ngram.resident_rows": _RESIDENT,
            "ngram.host_rows": host_rows,
            "tables.disk": disk,
            "tables.prefetch": 2,
            "tables.row_format": "bfloat16",
            "tables.moments": "rowwise",
        }
        named = {key: str(value) for key, value in keys.items()}
        config = with_eos(load_config(_CONFIG, named), 0)
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        self._steps = steps
        self._programs = TrainStep(config, mesh)
        self._state = init_state(self._programs.blueprint, random_params(self._programs.model))
        self._schedule = make_schedule(config, _STEPS)
        self.spec = spec = self._programs.reads.specs[NGRAM]
        made = time.perf_counter()
        if spec.on_disk:
            first = FirstRows.of(spec, table_key(config, NGRAM))
            self.store: HostStore = DiskStore.begin(spec, mesh, first, _MOST_SAVES, replace=False)
        else:
            self.store = HostStore.create(spec, table_key(config, NGRAM), mesh)
        self._prefetch = Prefetch(mesh, self.store, config.tables.cache_policy, 2)
        table = TableState(**self._prefetch.load())
        tables = jax.block_until_ready({NGRAM: table})
        self._state = dataclasses.replace(self._state, tables=tables)
        opened = time.perf_counter()
        self._ahead = LookAhead(
            self._programs, self._batches(config), _STEPS, {NGRAM: self._prefetch}
        )
        self.rows: list[dict[str, float]] = []
        self._make(1)
        ended = time.perf_counter()
        self.start = {"model": made - begun, "table": opened - made, "first step": ended - opened}

    def __call__(self) -> None:
        self._make(self._steps)

    def close(self) -> None:
        """Ends the threads and gives the disk back."""
        self._prefetch.close()
        if isinstance(self.store, DiskStore):
            self.store.close()

    def _make(self, steps: int) -> None:
        for ready in itertools.islice(self._ahead, steps):
            self._state = self._ahead.place(self._state, ready)
            self._state, _ = self._programs.update(
                self._state, ready.batch, self._schedule, ready.slots, ready.sizes
            )
            self.rows.append({name: float(value) for name, value in ready.metrics.items()})
        self._state = jax.block_until_ready(self._ahead.settle(self._state))

    def _batches(self, config) -> Iterator[Batch]:
        rng = np.random.default_rng(0)
        text_BxT = zipf_tokens(config)
        shape = (1, *text_BxT[:, 1:].shape)

        def place(array, dtype=jnp.int32):
            array = np.asarray(np.broadcast_to(array, shape), dtype)
            return jax.device_put(array, self._programs.batch_sharding)

        while True:
            keys = distinct_keys(rng, self.spec.layout.num_keys).reshape(*shape, _HASHES)
            yield Batch(
                tokens=place(text_BxT[:, :-1]),
                targets=place(text_BxT[:, 1:]),
                positions=place(np.arange(shape[-1])),
                segment_ids=place(1),
                loss_mask=place(True, bool),
                keys={NGRAM: jnp.asarray(keys)},
            )


def main() -> None:
    """Runs the benchmark and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=10**6)
    parser.add_argument("--host-gib", type=float, default=0.04, help="rows in host memory")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4, help="of each turn")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a new one")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder, prefix="table-disk-"))
    try:
        print(json.dumps(_measured(args, folder), indent=2))
    finally:
        shutil.rmtree(folder)


def _measured(args: argparse.Namespace, folder: Path) -> dict:
    # What every process pays once belongs to none of the runs.
    Run(_FEW, args.steps, _STEPS * 10, folder / "none").close()
    few = Run(_FEW, args.steps, _STEPS * 10, folder / "none")
    before = anonymous_bytes()
    host_rows = int(args.host_gib * 2**30 / few.spec.row_bytes(*few.store.fields))
    many = Run(args.keys, args.steps, host_rows, folder)
    assert isinstance(many.store, DiskStore), "there are more rows than memory has room for"
    filling = filled(many.store, folder)
    [block] = many.store.blocks
    assert isinstance(block.tier, RowTiers)
    many.store.take_counts()
    many.rows.clear()
    rng = np.random.default_rng(1)
    # What of a batch is neither on the device nor in host memory.
    count = args.steps * round(ROWS * (1 - (host_rows + _RESIDENT) / many.spec.num_rows))
    out = block.tier.file.record.empty(count)
    size = block.tier.file.record.size
    [data] = {path.parent for path in folder.glob("**/*.rows")}
    files = DataFiles(data, size, places_of_a_file(size, many.spec.num_rows), writable=False)

    def drawn() -> np.ndarray:
        rows = np.unique(rng.integers(0, args.keys, 2 * count))
        return rng.permutation(rows)[:count]

    def as_rows() -> None:
        block.tier.file.read(drawn(), out)

    def as_bytes() -> None:
        files.read(np.sort(drawn()))

    fetched: dict[str, list[int]] = {}

    def counted(name: str, call):
        def turn() -> None:
            start = fetched_bytes()
            call()
            fetched.setdefault(name, []).append(fetched_bytes() - start)

        return turn

    calls = {"few keys": few, "on disk": many, "rows alone": as_rows, "bytes alone": as_bytes}
    seconds = interleave({name: counted(name, call) for name, call in calls.items()}, args.rounds)
    anonymous = anonymous_bytes()
    result = {
        "keys": many.spec.layout.num_keys,
        "host_rows": host_rows,
        "start_seconds": {
            name: {part: round(took, 2) for part, took in run.start.items()}
            for name, run in (("few keys", few), ("on disk", many))
        },
        **filling,
        "step_seconds": {
            name: round(statistics.median(times) / args.steps, 4) for name, times in seconds.items()
        },
        "mib_from_the_device_a_step": {
            name: round(statistics.median(taken[1:]) / args.steps / 2**20, 1)
            for name, taken in fetched.items()
        },
        "on_disk_over": {
            other: [round(x, 3) for x in _ratios(seconds, other)]
            for other in calls
            if other != "on disk"
        },
        "rows_a_step": {
            name: round(statistics.mean(row[f"{NGRAM}/{name}"] for row in many.rows), 4)
            for name in _OF_ROWS
        },
        "rss_anon_mib": {
            "with few keys alone": round(before / 2**20),
            "at the end": round(anonymous / 2**20),
            "rows in host memory": round(args.host_gib * 2**10),
            "constant": round((anonymous - 1.1 * args.host_gib * 2**30) / 2**20),
        },
    }
    few.close()
    many.close()
    files.close()
    result |= {"rounds": args.rounds, "steps_a_turn": args.steps, "load": os.getloadavg()}
    return result | {"device": jax.devices()[0].device_kind, "jax": jax.__version__}


def _ratios(seconds: dict[str, list[float]], other: str) -> tuple[float, float, float]:
    """The median over rounds, and what 90% of the rounds lie between."""
    return speed_ratio(seconds, other, "on disk"), *ratio_range(seconds, other, "on disk")


if __name__ == "__main__":
    main()
