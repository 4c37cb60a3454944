"""What checksums cost a restore, and what saves of changed rows take: bytes, seconds, memory.

python -m benchmarks.table_saves [--mib=1024] [--rounds=5]

A table in host memory with its moments, of random numbers. Saved whole, then with 1% of its rows
touched, while two threads write to it; then read back, with checksums compared in turns with that.
Memory is the largest resident set of a save over the resident set before it.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.train_step import bench_config
from stem_jax.bucket import walk
from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.files import FOLDER, damage
from stem_jax.config import Config
from stem_jax.memory.catalogue import table_specs
from stem_jax.mesh import make_mesh, replicated
from stem_jax.tables.host_store import HostStore
from stem_jax.training.state import TrainState, table_key

_WIDTH = 4096
_TOUCHED = 0.01
_PIECE = 256


class TableRun:
    """A run that is its table in host memory. mesh: of one device."""

    def __init__(self, folder: Path, mib: int, rounds: int):
        rows = mib * 2**20 // (2 * _WIDTH * 4 * 3)
        keys = {"model__vocab_size": rows, "model__ffn_dim": _WIDTH, "model__num_layers": 3}
        keys |= {"model__stem_layers": (0, 1), "tables__resident_rows": rows // 2}
        self.config: Config = bench_config(**keys)
        self.spec = table_specs(self.config)["stem"]
        self.mesh = make_mesh(self.config.mesh, jax.devices()[:1])
        self.folder = folder
        self.checkpoints = Checkpointer(folder, keep=rounds + 2, full_every=rounds + 2)
        self.store = HostStore.create(self.spec, table_key(self.config), self.mesh)
        self.step = 0

    @property
    def num_bytes(self) -> int:
        """Of the table with its moments."""
        return self.spec.num_rows * self.spec.row_bytes()

    def touch(self, rows: np.ndarray) -> None:
        """An update of these rows, with random numbers."""
        self.step += 1
        rng = np.random.default_rng(self.step)
        for first in range(0, len(rows), _PIECE):
            part = rows[first : first + _PIECE]
            values = {
                field.name: rng.standard_normal(self.spec.shape(field.name, len(part)), np.float32)
                for field in self.spec.moved_fields
            }
            last_step = np.full(len(part), self.step, np.int32)
            self.store.write(self.store.blocks[0], part, values | {"last_step": last_step})

    def save(self) -> None:
        """Starts a save."""
        info = CheckpointInfo(
            self.step, self.step, 0, {"stem": self.spec.num_rows}, "none", {}, self.config
        )
        self.checkpoints.save(self._state(self.step), info, None, {"stem": self.store})

    def restore(self, step: int) -> None:
        """Reads a save into the store."""
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self._state(0)
        )
        self.checkpoints.restore(step, target, {"stem": self.store})

    def saved_bytes(self, step: int) -> int:
        """Of the table's items."""
        items = [self.folder / FOLDER / str(step) / name for name in ("table_rows", "table_slots")]
        return sum(path.stat().st_size for item in items for path in walk(item))

    def _state(self, number: int) -> TrainState:
        value = jax.device_put(np.int32(number), replicated(self.mesh))
        return TrainState(value, value, value, {"stem": value}, {"w": value}, (value,), {})


def resident_bytes(name: str) -> int:
    """VmRSS, or VmHWM: the largest since the last call; page cache is in neither."""
    status = Path("/proc/self/status").read_text().splitlines()
    found = next(int(line.split()[1]) for line in status if line.startswith(name))
    Path("/proc/self/clear_refs").write_text("5")
    return found * 1024


def save_beside_writes(run: TableRun) -> tuple[float, int]:
    """Seconds of a save beside which rows are written, and the bytes that it took at most."""
    stop = threading.Event()

    def write(seed: int) -> None:
        rng, block = np.random.default_rng(seed), run.store.blocks[0]
        while not stop.wait(0.01):
            rows = rng.choice(len(block.row_range), 16, replace=False)
            values = {n: np.zeros((16, *a.shape[1:]), a.dtype) for n, a in block.arrays.items()}
            # As they were: not what the next save takes for changed.
            run.store.gather(block, rows, values)
            run.store.write(block, rows, values)

    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(2)]
    before = resident_bytes("VmRSS")
    started = time.perf_counter()
    run.save()
    for writer in writers:
        writer.start()
    run.checkpoints.wait()
    seconds = time.perf_counter() - started
    stop.set()
    for writer in writers:
        writer.join()
    return seconds, resident_bytes("VmHWM") - before


def main() -> None:
    """Runs the benchmark and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024, help="of the table with its moments")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to save; without it, a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run = TableRun(Path(folder) / "run", args.mib, args.rounds)
        result = _measured(run, args.rounds)
        run.checkpoints.close()
    print(json.dumps(result, indent=2))


def _measured(run: TableRun, rounds: int) -> dict:
    every = np.arange(run.spec.num_rows)
    run.touch(every)
    whole_seconds, whole_more = save_beside_writes(run)
    rng, changes = np.random.default_rng(0), []
    for _ in range(rounds):
        run.touch(np.sort(rng.permutation(every)[: int(_TOUCHED * len(every))]))
        seconds, more = save_beside_writes(run)
        changes.append((seconds, more, run.saved_bytes(run.step)))
    whole_bytes = run.saved_bytes(1)
    restored: dict[str, list[float]] = {"whole": [], "verify": [], "chain": [], "verify_chain": []}
    for _ in range(rounds):
        for name, step in (("whole", 1), ("chain", run.step)):
            restored[name].append(_seconds(lambda step=step: run.restore(step)))
            verify = "verify" if step == 1 else "verify_chain"
            restored[verify].append(_seconds(lambda step=step: _check(run, step)))
    shares = [v / (v + r) for v, r in zip(restored["verify"], restored["whole"], strict=True)]
    return {
        "table_mib": run.num_bytes >> 20,
        "whole_save_seconds": round(whole_seconds, 2),
        "changes_save_seconds": round(statistics.median(c[0] for c in changes), 2),
        "whole_save_more_mib": whole_more >> 20,
        "whole_save_more_of_table": round(whole_more / run.num_bytes, 3),
        "changes_save_more_mib": max(c[1] for c in changes) >> 20,
        "changes_share_of_bytes": round(max(c[2] for c in changes) / whole_bytes, 4),
        **{f"{n}_seconds": round(statistics.median(s), 2) for n, s in restored.items()},
        "verify_share_of_restore": round(statistics.median(shares), 3),
        "verify_share_at_most": round(max(shares), 3),
        "rounds": rounds,
        "jax": jax.__version__,
    }


def _check(run: TableRun, step: int) -> None:
    assert damage(run.folder / FOLDER / str(step), verify=True) is None


def _seconds(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
