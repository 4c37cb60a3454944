"""The mesh that a trained model is read on: as many devices of this process as are asked for."""

import dataclasses
import math

import jax
from jax.sharding import Mesh

from stem_jax.config import Config
from stem_jax.errors import InputError
from stem_jax.mesh import axis_size, check_placement, make_mesh
from stem_jax.model.attention import check_heads
from stem_jax.training.blueprint import Blueprint


def inference_mesh(config: Config, devices: int = 1) -> tuple[Config, Mesh]:
    """A mesh of the first devices of this process, and the configuration with its sizes.

    As many of them as divide the model share every layer (`tensor`): each then reads its part of
    the weights once a token. What is left divides the batch and keeps the weights in parts
    (`fsdp`).

    Raises:
        InputError: more devices than there are, or a number that does not divide the model.
    """
    own = jax.local_devices()
    if not 1 <= devices <= len(own):
        raise InputError(
            f"--devices={devices} must be at least 1 and at most the {len(own)} of this process"
        )
    reasons = []
    for tensor in range(devices, 0, -1):
        if devices % tensor:
            continue
        one = config.mesh.on_one_device()
        sizes = dataclasses.replace(one, fsdp=devices // tensor, tensor=tensor)
        placed = dataclasses.replace(config, mesh=sizes)
        mesh = make_mesh(sizes, own[:devices])
        try:
            _check(placed, mesh)
        except InputError as error:
            reasons.append(str(error))
        else:
            return placed, mesh
    raise InputError(f"--devices={devices} does not divide this model: {reasons[-1]}")


def _check(config: Config, mesh: Mesh) -> None:
    check_heads(config.model, mesh)
    blueprint = Blueprint(config, mesh)
    check_placement(blueprint.placed(), mesh, math.inf)
    most = max((spec.num_rows for spec in blueprint.specs.values()), default=0)
    for spec in blueprint.specs.values():
        owners = axis_size(mesh, spec.vocab_axes)
        if spec.offloaded and owners > 1:
            raise InputError(
                f"{spec.resident_key}={spec.resident_rows} keeps rows in host memory, which "
                f"{owners} devices would divide; give --resident-rows={most} to keep all "
                "rows on them"
            )
