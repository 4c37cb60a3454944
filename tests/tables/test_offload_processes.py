"""Several processes with rows in host memory train as one process with all rows on its devices.

Each keeps books of its own shards alone, and swaps as many rows as these need.

The file is its own child: `python .../test_offload_processes.py FOLDER CONFIG [CONFIG]`.
"""

import contextlib
import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.config import Config
from stem_jax.config_file import config_from_json
from stem_jax.mesh import make_mesh
from stem_jax.tables import row_slots
from stem_jax.tables.host_store import HostStore
from stem_jax.tables.row_slots import RowSlots
from stem_jax.training.state import abstract_state
from stem_jax.training.step import TrainStep
from tests.children import finish, pair
from tests.logical import logical_table
from tests.offloading import SIZES, run

pytestmark = pytest.mark.little_effort
STEPS = 20
# One layer: three processes compile.
OVERRIDES = SIZES | {
    "model.num_layers": 1,
    "model.stem_layers": (0,),
    "train.steps": STEPS,
    "eval.every": 12,
    "checkpoint.every": STEPS // 2,
    "tables.prefetch": 2,
}
# On the second mesh both processes have a copy of each shard, and of its columns a half.
PLACES = [
    ((8, 1, 1), ("data", "fsdp"), 208),
    ((2, 2, 2), ("fsdp",), 208),
]


@pytest.mark.long
@pytest.mark.parametrize(("shape", "vocab_axes", "rows"), PLACES)
def test_two_processes_train_as_one(train_step, tiny_config, tmp_path, shape, vocab_axes, rows):
    overrides = OVERRIDES | {"tables.vocab_axes": vocab_axes}
    sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), shape, strict=True))
    config = tiny_config(**overrides, **sizes, **{"tables.resident_rows": rows})
    argv = [__file__, str(tmp_path), config.to_json()]
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(process) for process in pair(*argv, devices=4)]
        # Meanwhile, in this process.
        resident = train_step(shape, **overrides)
        expected = run(resident, tmp_path / "alone")
        for process in both:
            finish(process)
    found = [np.load(tmp_path / f"process_{number}.npz") for number in range(2)]
    for key in ("train/loss", "eval/loss"):
        values = list(expected.values(key).values())
        assert len(values) == (STEPS if key == "train/loss" else 2)
        np.testing.assert_allclose(found[0][key], values, rtol=0, atol=1e-5)
    assert found[0]["evictions"] > 100
    # Of their own shards; where each has a copy of all, they swap alike.
    owners = [[0, 1, 2, 3], [4, 5, 6, 7]] if len(vocab_axes) == 2 else [[0, 1]] * 2
    assert [arrays["owners"].tolist() for arrays in found] == owners
    alike = np.array_equal(found[0]["swapped"], found[1]["swapped"])
    assert alike == (len(vocab_axes) == 1)
    # What they saved together is what they had, and a resident process restores it.
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [STEPS // 2, STEPS]
        target = abstract_state(resident.blueprint)
        state = checkpoints.restore(STEPS, target)
    present = np.zeros(resident.reads.specs["stem"].num_rows, int)
    table = logical_table(state.tables["stem"])
    for name, whole in table.items():
        for arrays in found:
            for key in filter(lambda key: key.startswith(f"{name}/"), arrays):
                first, end, left, right = map(int, key.split("/")[1:])
                part = whole[first:end] if whole.ndim == 1 else whole[first:end, :, left:right]
                np.testing.assert_array_equal(arrays[key], part, err_msg=key)
                present[first:end] += name == "rows"
    assert (present > 0).all()
    # It is the table of the run that was resident from the start, but for the order of sums.
    np.testing.assert_allclose(table["rows"], expected.table["rows"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(table["last_step"], expected.table["last_step"])
    continued = run(resident, tmp_path / "on", resume=(tmp_path, STEPS // 2))
    losses = list(expected.values("train/loss").values())[STEPS // 2 :]
    found = list(continued.values("train/loss").values())
    np.testing.assert_allclose(found, losses, rtol=0, atol=1e-5)


@pytest.mark.long
def test_rows_in_host_memory_change_no_bit_of_four_processes(tiny_config, tmp_path):
    """Two shards each; one process that swapped more rows than another would hang, or differ."""
    few = {"train.steps": 8, "eval.every": 6, "checkpoint.every": 8, "mesh.data": 8}
    of_all = OVERRIDES | few | {"tables.vocab_axes": ("data", "fsdp")}
    configs = [tiny_config(**of_all, **{"tables.resident_rows": rows}) for rows in (208, None)]
    argv = [__file__, str(tmp_path), *(config.to_json() for config in configs)]
    with contextlib.ExitStack() as stack:
        for process in [stack.enter_context(one) for one in pair(*argv, devices=2, count=4)]:
            finish(process)
    found = [np.load(tmp_path / f"process_{number}.npz") for number in range(4)]
    assert [arrays["owners"].tolist() for arrays in found] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    swapped_4xT = np.stack([arrays["swapped"] for arrays in found])
    assert (swapped_4xT.sum(1) > 0).all() and (swapped_4xT != swapped_4xT[0]).any(0).sum() > 4
    resident = np.load(tmp_path / "resident" / "process_0.npz")
    for key in ("train/loss", "eval/loss"):
        np.testing.assert_array_equal(found[0][key], resident[key], err_msg=key)
    for number, arrays in enumerate(found):
        resident = np.load(tmp_path / "resident" / f"process_{number}.npz")
        keys = [key for key in arrays if "/" in key and not key.endswith("loss")]
        assert len(keys) == 2 * 4 and set(keys) <= set(resident)
        for key in keys:
            np.testing.assert_array_equal(arrays[key], resident[key], err_msg=key)


def _train(folder: Path, config: Config, *resident: Config) -> None:
    number, count = (int(os.environ[name]) for name in ("PAIR_ID", "PAIR_COUNT"))
    # As in runs of many rows, whose sizes are never the least.
    row_slots._SMALLEST_MOVE = 4
    jax.distributed.initialize(os.environ["PAIR_ADDRESS"], count, number)
    assert len(jax.devices()) == 8 and len(jax.local_devices()) == 8 // count
    _train_one(folder, config, number, count)
    for other in resident:
        _train_one(folder / "resident", other, number, count)


def _train_one(folder: Path, config: Config, number: int, count: int) -> None:
    step = TrainStep(config, make_mesh(config.mesh))
    blocks, moves, assign = [], [], RowSlots.assign

    def assigned(slots, *args, **kwargs):
        moves.append((slots.owners, assign(slots, *args, **kwargs)))
        return moves[-1][1]

    def watch(state, prefetch):
        table = None if prefetch is not None else vars(state.tables["stem"])
        spec = step.reads.specs["stem"]
        store = HostStore.copy_of(spec, step.mesh, table) if table else prefetch.store
        blocks[:] = store.blocks

    RowSlots.assign = assigned
    outcome = run(
        step,
        folder / f"process_{number}",
        checkpoints=folder,
        processes=(number, count),
        watch=watch,
    )
    arrays = {
        f"{name}/{b.row_range.start}/{b.row_range.stop}/{b.column_range.start}/"
        f"{b.column_range.stop}": array
        for b in blocks
        for name, array in b.arrays.items()
    }
    for key in ("train/loss", "eval/loss"):
        arrays[key] = np.array(list(outcome.values(key).values()))
    arrays["evictions"] = outcome.total("table/evictions")
    RowSlots.assign = assign
    if moves:
        arrays["owners"] = np.array(moves[0][0])
        arrays["swapped"] = np.array([move.size for _, move in moves])
    np.savez(folder / f"process_{number}.npz", **arrays)


if __name__ == "__main__":
    _train(Path(sys.argv[1]), *map(config_from_json, sys.argv[2:]))
