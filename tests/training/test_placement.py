"""What a mesh may not do with large arrays: replicate them, or divide what does not divide."""

import dataclasses

import pytest
from jax.sharding import PartitionSpec

from stem_jax.errors import InputError
from stem_jax.mesh import check_placement
from stem_jax.training.step import TrainStep


def test_the_shipped_layout_is_accepted(train_step):
    step = train_step((2, 2, 2))
    check_placement(step.blueprint.placed(), step.mesh, max_replicated_mib=0.001)


def test_large_replicated_arrays_are_refused(train_step, device_mesh):
    step = train_step((2, 2, 2))
    arrays = [
        dataclasses.replace(array, spec=PartitionSpec()) if array.name == "embed.weight" else array
        for array in step.blueprint.placed()
    ]
    message = r"1 arrays over mesh.max_replicated_mib=0.01 .*: embed.weight 0.0 MiB; shard them"
    with pytest.raises(InputError, match=message):
        check_placement(arrays, step.mesh, max_replicated_mib=0.01)
    # Below the bound, and on a mesh that has nothing to split by, it may be whole.
    check_placement(arrays, step.mesh, max_replicated_mib=1)
    check_placement(arrays, device_mesh((8, 1, 1)), max_replicated_mib=0.01)


@pytest.mark.parametrize(
    ("overrides", "shape", "message"),
    [
        (
            {"model.vocab_size": 87},
            (2, 2, 2),
            r"embed.weight \(87, 32\): dimension=87 does not divide over the 2 devices of mesh "
            "axis tensor; change the model's sizes",
        ),
        (
            {"model.vocab_size": 84, "tables.pad_multiple": 1},
            (8, 1, 1),
            r"table_rows \(84, 2, 48\): dimension=84 does not divide over the 8 devices of mesh "
            "axis data, fsdp; make tables.pad_multiple",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused(overrides, shape, message, tiny_config, device_mesh):
    step = TrainStep(tiny_config(**overrides), device_mesh(shape))
    with pytest.raises(InputError, match=message):
        check_placement(step.blueprint.placed(), step.mesh, max_replicated_mib=16)
