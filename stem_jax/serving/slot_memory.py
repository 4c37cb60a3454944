"""Whether the slots of the engine fit into memory, asked before anything is compiled for them."""

from collections.abc import Sequence
from typing import Any

import jax

from stem_jax.errors import InputError
from stem_jax.tables.host_memory import available_host_bytes

_GIB = 2**30


def device_bytes(shapes: Any) -> int:
    """Bytes on each device of arrays that are described by shape, dtype and sharding."""
    total = 0
    for leaf in jax.tree.leaves(shapes):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        size = leaf.dtype.itemsize
        for length in shape:
            size *= length
        total += size
    return total


def free_bytes(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that each of the devices has left; None where nothing tells. CPUs share the host's."""
    left = []
    for device in devices:
        if device.platform == "cpu":
            available = available_host_bytes()
            left += [] if available is None else [available // len(devices)]
            continue
        told = device.memory_stats() or {}
        if "bytes_limit" in told:
            left.append(told["bytes_limit"] - told["bytes_in_use"])
    return min(left) if left else None


def check_slots(needed: int, free: int | None, slots: int, context: int) -> None:
    """Refuses slots whose caches alone are larger than what a device has left.

    Args:
        needed: bytes of all slots on each device.
        free: bytes that a device has left; None checks nothing.
        context: places of each slot.

    Raises:
        InputError: both figures, and how many slots fit.
    """
    if free is None or needed <= free:
        return
    most = slots * free // needed
    fewer = f"give --slots={most} or fewer, " if most else ""
    raise InputError(
        f"--slots={slots}, each of {context} tokens, take {needed / _GIB:.2f} GiB on each device, "
        f"which has {free / _GIB:.2f} GiB left; {fewer}"
        "a larger device or more of them (--devices), or a run of a shorter context"
    )
