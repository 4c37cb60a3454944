"""Two processes with rows in host memory train as one process with all rows on its devices.

The file is its own child: `python .../test_offload_processes.py FOLDER CONFIG`.
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


def _train(folder: Path, config: Config) -> None:
    number = int(os.environ["PAIR_ID"])
    jax.distributed.initialize(os.environ["PAIR_ADDRESS"], 2, number)
    assert len(jax.devices()) == 8 and len(jax.local_devices()) == 4
    step = TrainStep(config, make_mesh(config.mesh))
    blocks = []

    def watch(state, prefetch):
        blocks[:] = prefetch.store.blocks

    outcome = run(
        step, folder / f"process_{number}", checkpoints=folder, processes=(number, 2), watch=watch
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
    np.savez(folder / f"process_{number}.npz", **arrays)


if __name__ == "__main__":
    _train(Path(sys.argv[1]), config_from_json(sys.argv[2]))
