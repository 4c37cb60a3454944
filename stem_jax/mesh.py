"""The device mesh, its axis names, and the one table that maps logical axes to mesh axes."""

import dataclasses
import math
from collections.abc import Iterable

import jax
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from stem_jax.config import MeshConfig
from stem_jax.errors import InputError

AXES = ("data", "fsdp", "context", "tensor")
# A global batch is split over these axes; a device's share of it is one block of sequences.
BATCH_AXES = ("data", "fsdp")
# The positions of a sequence are split over this one, in the order of `context_order`.
CONTEXT = "context"
# So a device's tokens are its positions of its sequences.
TOKEN_AXES = (*BATCH_AXES, CONTEXT)

# Logical axis of a backbone parameter -> mesh axis. Tables have their own rule in tables/spec.
LOGICAL_TO_MESH = {
    "embed": "fsdp",
    "ffn": "tensor",
    # Each device has its share of every expert.
    "experts": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    # Fewer than the devices of `tensor`: each device has all of them, and reads one.
    "shared_kv_heads": None,
    # Of a memory's rows, as their columns lie.
    "memory": "tensor",
    # A dozen.
    "gate_inputs": None,
    # Of a token's rows, which all go to the same place.
    "row_keys": None,
    # Of a short convolution.
    "taps": None,
    "vocab": "tensor",
    "norm": None,
    # Of an adapter: a few dozen at most.
    "rank": None,
    # Each device has its share of every layer.
    "layers": None,
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Builds the (data, fsdp, context, tensor) mesh over `devices` (default: all).

    Several TPU slices follow each other along `data`: their network is slower than the links
    within a slice, and gradients of the backbone are all that crosses it.

    Raises:
        InputError: the axis sizes do not multiply to the number of devices, or `mesh.data` does
            not divide over the slices.
    """
    devices = jax.devices() if devices is None else devices
    numbers = slice_of(devices)
    slices = sorted(set(numbers))
    sizes = {axis: getattr(config, axis) for axis in AXES}
    if sizes["data"] != -1 and sizes["data"] % len(slices):
        raise InputError(
            f"mesh.data={sizes['data']} does not divide over {len(slices)} slices; only data may "
            f"span slices, so set mesh.data={len(slices)} or a multiple"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices) or sizes["data"] % len(slices):
        shape = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        raise InputError(
            f"{shape} do not multiply to the {len(devices)} devices"
            + (f" of {len(slices)} equal slices" if len(slices) > 1 else "")
            + ("; change one of them" if free else "; change one of them, or set one to -1")
        )
    axis_types = (AxisType.Auto,) * len(AXES)
    # Either knows how to lay a slice out along its links.
    if len(slices) == 1:
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=axis_types, devices=devices)
    inside = tuple((sizes | {"data": sizes["data"] // len(slices)}).values())
    between = (len(slices), *(1,) * (len(AXES) - 1))
    laid_out = create_hybrid_device_mesh(inside, between, devices)
    return Mesh(laid_out, AXES, axis_types=axis_types)


def slice_of(devices: Iterable[jax.Device]) -> list[int]:
    """The TPU slice of each device; 0 for all where there is but one."""
    # GPUs number their hosts in the same field, and parameters may well be split over hosts.
    return [
        (getattr(device, "slice_index", None) or 0) if device.platform == "tpu" else 0
        for device in devices
    ]


def axis_size(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """Number of devices along one mesh axis or several taken together."""
    if axes is None:
        return 1
    names = (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[name] for name in names)


def parameter_spec(logical_axes: tuple[str, ...]) -> PartitionSpec:
    """The partition spec of a backbone parameter with these logical axes."""
    return PartitionSpec(*(LOGICAL_TO_MESH[axis] for axis in logical_axes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose leading dimension is the global batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def token_spec(*others: str | None) -> PartitionSpec:
    """The partition spec of an array [B, L, ...]; `others` are the axes of its other dimensions."""
    return PartitionSpec(BATCH_AXES, CONTEXT, *others)


def own_batch_shards(mesh: Mesh) -> tuple[int, ...]:
    """Which shards of the batch, in their order, lie on devices of this process."""
    groups = mesh.devices.reshape(axis_size(mesh, BATCH_AXES), -1)
    own = jax.process_index()
    return tuple(
        shard for shard, group in enumerate(groups) if own in {d.process_index for d in group}
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of a small array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def divided(mesh: Mesh | None) -> Mesh | None:
    """The mesh, if it has several devices: on one, programs that know of none compile sooner."""
    return None if mesh is None or mesh.size == 1 else mesh


def constrain_tokens(x: jax.Array, mesh: Mesh | None, *others: str | None) -> jax.Array:
    """Pins an activation [B, L, ...] to the axes of its tokens, its width unsharded.

    Args:
        others: mesh axes of its other dimensions instead.
    """
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, token_spec(*others)))


def live_axes(mesh: Mesh | None, *axes: str) -> tuple[str, ...]:
    """Those of the axes that have more than one device: a collective over one is only copies."""
    return tuple(axis for axis in axes if mesh is not None and mesh.shape[axis] > 1)


def gather(x: jax.Array, axis: str, dimension: int, mesh: Mesh | None) -> jax.Array:
    """Inside `shard_map`: the whole of a dimension that is sharded over one mesh axis."""
    if not live_axes(mesh, axis):
        return x
    return jax.lax.all_gather(x, axis, axis=dimension, tiled=True)


def sum_and_scatter(
    x: jax.Array, scatter_axis: str, dimension: int, mesh: Mesh | None
) -> jax.Array:
    """Inside `shard_map`: the sum over all devices' tokens, `dimension` sharded over one axis."""
    if live_axes(mesh, scatter_axis):
        # First, so that the other axes sum a shard and not the whole.
        x = jax.lax.psum_scatter(x, scatter_axis, scatter_dimension=dimension, tiled=True)
    others = (axis for axis in TOKEN_AXES if axis != scatter_axis)
    return jax.lax.psum(x, live_axes(mesh, *others))


def check_divides(
    size: int,
    what: str,
    axes: str | tuple[str, ...] | None,
    mesh: Mesh,
    remedy: str = "change it, or the mesh",
) -> None:
    """Raises InputError when `size` cannot be split evenly over the mesh axes."""
    shards = axis_size(mesh, axes)
    if size % shards:
        names = axes if isinstance(axes, str) else ", ".join(axes or ())
        raise InputError(
            f"{what}={size} does not divide over the {shards} devices of mesh axis {names}; "
            f"{remedy}"
        )


def check_context(seq_len: int, mesh: Mesh) -> None:
    """Raises InputError for sequences that cannot be cut into two chunks for each device."""
    devices = mesh.shape[CONTEXT]
    if devices > 1 and seq_len % (2 * devices):
        raise InputError(
            f"train.seq_len={seq_len} does not divide into {2 * devices} chunks, two for each of "
            f"the {devices} devices of mesh axis {CONTEXT}; change it, or mesh.{CONTEXT}"
        )


@dataclasses.dataclass(frozen=True)
class Placed:
    """One array of the run: what it is called, its global shape and dtype, and its sharding.

    `remedy` says which keys change its shape.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    spec: PartitionSpec
    remedy: str = "change the model's sizes, or the mesh"

    def total_bytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.itemsize

    def device_bytes(self, mesh: Mesh) -> int:
        """Bytes on each device."""
        shards = math.prod(axis_size(mesh, axes) for axes in self.spec)
        return self.total_bytes() // shards


def check_placement(arrays: list[Placed], mesh: Mesh, max_replicated_mib: float) -> None:
    """Refuses arrays that do not divide, and large ones left whole on a mesh that could split them.

    Raises:
        InputError: names the offenders, their bytes and the remedy.
    """
    for array in arrays:
        for size, axes in zip(array.shape, array.spec, strict=False):
            check_divides(size, f"{array.name} {array.shape}: dimension", axes, mesh, array.remedy)
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return
    limit = max_replicated_mib * 2**20
    whole = [a for a in arrays if a.device_bytes(mesh) == a.total_bytes() > limit]
    if whole:
        listed = ", ".join(f"{a.name} {a.total_bytes() / 2**20:.1f} MiB" for a in whole[:8])
        raise InputError(
            f"{len(whole)} arrays over mesh.max_replicated_mib={max_replicated_mib} would be whole "
            f"on every device: {listed}; shard them or raise the bound"
        )
