"""Host stores and checkpoints in processes of their own: memory, a kill, two processes at once.

The file is its own child: `python .../test_store_processes.py TASK FOLDER CONFIG...`.
"""

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.config import Config
from stem_jax.config_file import config_from_json
from stem_jax.memory.catalogue import table_specs
from stem_jax.mesh import make_mesh, replicated
from stem_jax.tables.host_memory import available_host_bytes
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.store_snapshot import StoreSnapshot
from stem_jax.training.state import TrainState
from tests.children import child, finish, pair
from tests.offloading import FIELDS

GIB = 2**30


def task(name: str, folder: Path, *configs: Config) -> list[str]:
    """Arguments of a process that runs one of the tasks below."""
    return [__file__, name, str(folder), *(config.to_json() for config in configs)]


@pytest.fixture
def on_mesh(tiny_config):
    """on_mesh(mesh shape, **overrides): a configuration."""

    def make(shape=(1, 1, 1), **overrides):
        axes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), shape, strict=True))
        return tiny_config(**axes, **overrides)

    return make


def mesh_of(config) -> Mesh:
    sizes = config.mesh
    return make_mesh(sizes, jax.devices()[: sizes.data * sizes.fsdp * sizes.tensor])


def empty_store(config) -> HostStore:
    return HostStore.allocate(table_specs(config)["stem"], mesh_of(config))


def small_state(mesh, number) -> TrainState:
    """A state with next to nothing beside the table."""
    value = jax.make_array_from_callback((), replicated(mesh), lambda _: np.int32(number))
    return TrainState(value, value, value, {"stem": value}, {"w": value}, (value,), {})


def save(checkpoints, config, store, number):
    info = CheckpointInfo(
        step=number,
        updates=number,
        bad_steps=0,
        touched_rows={"stem": 0},
        tokenizer="none",
        data={},
        config=config,
    )
    checkpoints.save(small_state(mesh_of(config), number), info, None, {"stem": store})


def restore(checkpoints, config, store, number):
    state = small_state(mesh_of(config), 0)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    assert int(checkpoints.restore(number, target, {"stem": store}).params["w"]) == number


def parts(spec, block, seed) -> dict[str, np.ndarray]:
    """A block's part of a table of random numbers."""
    rng, found = np.random.default_rng(seed), {}
    for name in FIELDS:
        shape = spec.shape(name)
        whole = rng.integers(1, 1 << 20, shape).astype(FIELDS[name])
        rows = whole[block.row_range.start : block.row_range.stop]
        columns = slice(block.column_range.start, block.column_range.stop)
        found[name] = rows if name == "last_step" else rows[..., columns]
    return found


def fill(store, seed):
    for block in store.blocks:
        store.write(block, np.arange(len(block.row_range)), parts(store.spec, block, seed))


def assert_holds(store, seed):
    for block in store.blocks:
        for name, array in parts(store.spec, block, seed).items():
            np.testing.assert_array_equal(block.arrays[name], array, err_msg=name)


# Memory. A table of 4 GiB with its slots: 16384 rows of two layers of 10922.
ROWS, WIDTH = 16384, 10924
# What does not grow with the table: pieces in flight, compressed and not, and Orbax's caches.
CONSTANT = 256 << 20


@pytest.mark.long
def test_peak_memory_is_little_over_the_store(on_mesh, tmp_path):
    needed = 5 * GIB
    free = shutil.disk_usage(tmp_path).free
    memory = available_host_bytes() or needed
    if min(free // 2, memory) < needed:
        pytest.skip(f"needs 5 GiB of memory, has {memory}, and 10 GiB of disk, has {free}")
    large = on_mesh((2, 1, 2), **{"model.vocab_size": ROWS, "model.ffn_dim": WIDTH})
    with child(*task("memory", tmp_path, on_mesh((2, 1, 2)), large), devices=4) as process:
        out = finish(process)
    print(out)
    figures = {line.split()[0]: line.split() for line in out.splitlines() if " MiB" in line}
    store = int(figures["store"][1])
    assert store >= 4096
    for phase in ("create", "save", "restore"):
        over_base = int(figures[phase][1])
        assert over_base <= 1.15 * store + CONSTANT / 2**20, out
    # The store was there, or the figures say nothing.
    assert min(int(figures[phase][1]) for phase in ("save", "restore")) >= store


def _memory(folder, tiny, config):
    # What JAX and Orbax need whatever the table: a tiny one goes the same ways.
    store = HostStore.create(table_specs(tiny)["stem"], jax.random.key(0), mesh_of(tiny))
    with Checkpointer(folder + "/tiny") as checkpoints:
        save(checkpoints, tiny, store, 1)
        checkpoints.wait()
        restore(checkpoints, tiny, store, 1)
    _peak_since_last()
    base = _peak_since_last()
    spec, mesh = table_specs(config)["stem"], mesh_of(config)
    print("store", HostStore.needed_bytes(spec, mesh) >> 20, "MiB")
    print("base", base >> 20, "MiB")

    def report(phase, start):
        taken = time.monotonic() - start
        print(phase, (_peak_since_last() - base) >> 20, "MiB over base,", f"{taken:.1f} s")

    start = time.monotonic()
    store = HostStore.create(spec, jax.random.key(0), mesh)
    report("create", start)
    start = time.monotonic()
    for block in store.blocks:
        numbers = np.arange(len(block.row_range))
        block.arrays["mu"][:] = numbers[:, None, None]
        block.arrays["nu"][:] = -numbers[:, None, None]
        block.arrays["last_step"][:] = numbers
    report("fill", start)
    expected = [block.arrays["rows"][::64].copy() for block in store.blocks]

    stop, written = threading.Event(), []

    def write(seed):
        rng, count = np.random.default_rng(seed), 64
        values = {
            name: np.full((count, *array.shape[1:]), -7, array.dtype)
            for name, array in store.blocks[0].arrays.items()
        }
        while not stop.wait(0.01):
            block = store.blocks[rng.integers(len(store.blocks))]
            store.write(block, rng.choice(len(block.row_range), count, replace=False), values)
            written.append(count)

    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(2)]
    with Checkpointer(folder + "/run") as checkpoints:
        start = time.monotonic()
        save(checkpoints, config, store, 1)
        for writer in writers:
            writer.start()
        checkpoints.wait()
        stop.set()
        for writer in writers:
            writer.join()
        report("save", start)
        print("rows written meanwhile:", sum(written))
        assert any((block.arrays["mu"] == -7).any() for block in store.blocks)
        start = time.monotonic()
        restore(checkpoints, config, store, 1)
        report("restore", start)
    for block, rows in zip(store.blocks, expected, strict=True):
        numbers = np.arange(len(block.row_range))
        np.testing.assert_array_equal(block.arrays["rows"][::64], rows)
        np.testing.assert_array_equal(block.arrays["last_step"], numbers)
        for name, sign in (("mu", 1), ("nu", -1)):
            for first in range(0, len(numbers), 256):
                piece = block.arrays[name][first : first + 256]
                assert (piece == sign * numbers[first : first + 256, None, None]).all()


def _peak_since_last() -> int:
    """The largest resident set since the last call, in bytes; page cache is not in it."""
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return peak * 1024


# A kill.


def test_a_save_that_is_killed_leaves_the_one_before(on_mesh, tmp_path):
    config = on_mesh()
    with child(*task("killed", tmp_path, config)) as process:
        finish(process, code=-signal.SIGKILL)
    folders = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert any(name.startswith("2") for name in folders), folders
    store = empty_store(config)
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1
        restore(checkpoints, config, store, 1)
        assert_holds(store, seed=1)
        save(checkpoints, config, store, 2)
        checkpoints.wait()
        assert checkpoints.latest_step() == 2


def _killed(folder, config):
    store = empty_store(config)
    with Checkpointer(folder) as checkpoints:
        fill(store, seed=1)
        save(checkpoints, config, store, 1)
        checkpoints.wait()
        pieces = StoreSnapshot.pieces

        def killing(self, block, name):
            yield from pieces(self, block, name)
            if name == "nu":
                os.kill(os.getpid(), signal.SIGKILL)

        StoreSnapshot.pieces = killing
        fill(store, seed=2)
        save(checkpoints, config, store, 2)
        checkpoints.wait()


# Two processes. On the second mesh all shards have a copy in each of them.
PAIR_PLACES = [((2, 2, 2), ("data", "fsdp")), ((2, 2, 2), ("fsdp",)), ((1, 4, 2), ("fsdp",))]


@pytest.mark.long
def test_two_processes_write_and_read_one_table(on_mesh, tmp_path):
    config = on_mesh((8, 1, 1))
    store = empty_store(config)
    fill(store, seed=9)
    with Checkpointer(tmp_path / "single") as checkpoints:
        save(checkpoints, config, store, 9)
        checkpoints.wait()
    configs = [on_mesh(shape, **{"tables.vocab_axes": axes}) for shape, axes in PAIR_PLACES]
    with contextlib.ExitStack() as stack:
        both = map(stack.enter_context, pair(*task("pair", tmp_path, *configs), devices=4))
        printed = [finish(process).splitlines() for process in list(both)]
    # No number of a table is written twice, also where both processes have it.
    for number, config in enumerate(configs):
        spec = table_specs(config)["stem"]
        whole = sum(np.prod(spec.shape(name)) for name in FIELDS)
        saved = [int(line.split()[-1]) for out in printed for line in out if f"at {number}" in line]
        assert len(saved) == 2 and sum(saved) == whole
    with Checkpointer(tmp_path / "pair", read_only=True, keep=9) as checkpoints:
        for number in range(len(PAIR_PLACES)):
            restore(checkpoints, config, store, number)
            assert_holds(store, seed=number)


def _pair(folder, *configs):
    jax.distributed.initialize(os.environ["PAIR_ADDRESS"], 2, int(os.environ["PAIR_ID"]))
    assert len(jax.devices()) == 8 and len(jax.local_devices()) == 4
    with (
        Checkpointer(folder + "/pair", keep=9) as checkpoints,
        Checkpointer(folder + "/single", read_only=True) as single,
    ):
        for number, config in enumerate(configs):
            store = empty_store(config)
            sizes = [b.arrays[name].size for b in store.blocks for name in b.saves]
            print(f"saved at {number}", sum(sizes))
            restore(single, config, store, 9)
            assert_holds(store, seed=9)
            fill(store, seed=number)
            save(checkpoints, config, store, number)
            # The save is of what the store held, in both processes.
            fill(store, seed=99)
            checkpoints.wait()


if __name__ == "__main__":
    run = {"memory": _memory, "killed": _killed, "pair": _pair}[sys.argv[1]]
    run(sys.argv[2], *map(config_from_json, sys.argv[3:]))
