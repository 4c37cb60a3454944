"""The slots on the devices of one process: rows go in and come out without a word from others.

A program over all devices of a run has the same sizes on every one, so processes would have to
agree on how many rows each swaps. Programs here see the shards of this process's own devices, laid
side by side along the rows, and nothing else: no collective, no other process. The arrays of the
whole table are taken apart before and put together after; no number is copied for that.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stem_jax.tables.host_store import DeviceArrays
from stem_jax.tables.spec import TableSpec, logical, stored

_OWN = "own"
_LINES = PartitionSpec(_OWN)


class SlotShards:
    """Reads and writes slots on the devices that this process has of a mesh.

    devices: of this process, in the order in which their shards lie side by side.
    """

    def __init__(self, mesh: Mesh, spec: TableSpec, fields: tuple[str, ...]):
        """fields: that the device side has, see `TableSpec.fields`."""
        here = jax.process_index()
        self.devices = [device for device in mesh.devices.flat if device.process_index == here]
        self._mesh = Mesh(np.array(self.devices), (_OWN,))
        # Side by side along the rows, which come first in a logical array.
        ranks = {name: len(spec.shape(name)) for name in fields}
        held = {name: PartitionSpec(*(None,) * min(1, n - 1), _OWN) for name, n in ranks.items()}
        moving = dict.fromkeys(fields, _LINES)
        self._held, self._moving = (
            {name: NamedSharding(self._mesh, part) for name, part in parts.items()}
            for parts in (held, moving)
        )
        local = functools.partial(jax.shard_map, mesh=self._mesh, check_vma=False)
        # Two programs: in one, the compiler would copy the whole table between reading and writing.
        self._read = jax.jit(
            local(_read, in_specs=(held, _LINES), out_specs=moving), out_shardings=self._moving
        )
        self._write = jax.jit(
            local(_write, in_specs=(held, moving, _LINES), out_specs=held),
            donate_argnums=0,
            out_shardings=self._held,
        )

    def staged(self, buffers: dict[jax.Device, dict[str, np.ndarray]]) -> DeviceArrays:
        """Rows [M, ...] of every field for each device, on their way there."""
        return {
            name: _joined([jax.device_put(buffers[d][name], d) for d in self.devices], place)
            for name, place in self._moving.items()
        }

    def swap(
        self,
        arrays: DeviceArrays,
        staged: DeviceArrays,
        places: dict[jax.Device, np.ndarray],
        *,
        leave: bool = True,
    ) -> tuple[DeviceArrays, DeviceArrays]:
        """Puts staged rows into the places [M] of each device; the arrays that were given are gone.

        Returns:
            The rows that were there, logical, [devices * M, ...]: none without `leave`. The arrays.
        """
        apart, lines = self._apart(arrays), self._lines(places)
        left: DeviceArrays = self._read(apart, lines) if leave else {}
        written = self._write(apart, staged, lines)
        return left, {
            name: jax.make_array_from_single_device_arrays(
                array.shape,
                array.sharding,
                [shard.data for shard in written[name].addressable_shards],
            )
            for name, array in arrays.items()
        }

    def _apart(self, arrays: DeviceArrays) -> DeviceArrays:
        """The shards of this process, side by side."""
        found = {}
        for name, array in arrays.items():
            shards = {shard.device: shard.data for shard in array.addressable_shards}
            found[name] = _joined([shards[device] for device in self.devices], self._held[name])
        return found

    def _lines(self, places: dict[jax.Device, np.ndarray]) -> jax.Array:
        lines = [jax.device_put(places[device], device) for device in self.devices]
        return _joined(lines, NamedSharding(self._mesh, _LINES))


def _joined(shards: list[jax.Array], sharding: NamedSharding) -> jax.Array:
    """One array of the shards of the devices of a sharding, in their order."""
    axis = sharding.spec.index(_OWN)
    shape = list(shards[0].shape)
    shape[axis] *= len(shards)
    return jax.make_array_from_single_device_arrays(tuple(shape), sharding, shards)


def _read(arrays: DeviceArrays, places_M: jax.Array) -> DeviceArrays:
    def read(array):
        inside_M = jnp.minimum(places_M, array.shape[min(1, array.ndim - 1)] - 1)
        return logical(array[inside_M] if array.ndim == 1 else array[:, inside_M])

    return {name: read(array) for name, array in arrays.items()}


def _write(arrays: DeviceArrays, staged: DeviceArrays, places_M: jax.Array) -> DeviceArrays:
    def write(array, rows):
        place = array.at[places_M] if array.ndim == 1 else array.at[:, places_M]
        return place.set(stored(rows), mode="drop", unique_indices=True)

    return {name: write(array, staged[name]) for name, array in arrays.items()}
