"""Machines by name, described on one without any: `v5e:8x8` is 64 chips of a v5e, `h100:8` a host
of eight GPUs.
"""

import dataclasses
import functools
import importlib.util
import math
import os
from collections.abc import Iterable
from typing import Any

import jax
from jax.experimental import topologies

from stem_jax.errors import InputError
from stem_jax.mesh import slice_of
from stem_jax.planning import gpus

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16"
# Slice shapes of docs.cloud.google.com/tpu/docs; fake CPU devices for a machine without libtpu.
KNOWN = {
    "v4": tuple(_CUBIC.split()),
    "v5e": _FLAT,
    "v5p": tuple(_CUBIC.split()),
    "v6e": _FLAT,
    **dict.fromkeys(gpus.KINDS, ("1", "2", "4", "8")),
    "cpu": ("1", "2", "4", "8", "16", "32", "64"),
}
INSTALL_LIBTPU = 'pip install "jax[tpu]"'


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` pods of one shape, or hosts of GPUs, joined by the data-centre network.

    kind: a key of `KNOWN`. shape: chips along each dimension of a slice; the GPUs of a host.
    """

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, name: str, slices: int = 1) -> "Topology":
        """Reads `v5e:8x8`.

        Raises:
            InputError: lists the known ones.
        """
        kind, _, shape = name.partition(":")
        if shape not in KNOWN.get(kind, ()):
            known = "; ".join(f"{k}:{' '.join(shapes)}" for k, shapes in KNOWN.items())
            raise InputError(f"--topology={name} is unknown; known are {known}")
        if slices < 1 or (kind == "cpu" and slices > 1):
            raise InputError(
                f"--slices={slices} must be at least 1, and 1 for cpu, which has no slices"
            )
        return cls(kind, tuple(int(size) for size in shape.split("x")), slices)

    def __str__(self) -> str:
        name = f"{self.kind}:{'x'.join(map(str, self.shape))}"
        slices = "hosts" if self.switched else "slices"
        return name if self.slices == 1 else f"{self.slices} {slices} of {name}"

    @property
    def switched(self) -> bool:
        """Whether every chip of a slice reaches every other with all its links: GPUs of a host."""
        return self.kind in gpus.KINDS

    @property
    def chips_per_slice(self) -> int:
        """Chips of one slice."""
        return math.prod(self.shape)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which dimensions are rings: 16 chips on v5e and v6e, a multiple of 4 in whole cubes."""
        if self.kind in ("v5e", "v6e"):
            return tuple(size == 16 for size in self.shape)
        return (all(size % 4 == 0 for size in self.shape),) * len(self.shape)

    def devices(self) -> list[jax.Device]:
        """Devices to compile for. Sets environment variables that libtpu and XLA read.

        Raises:
            InputError: libtpu or the CUDA plugin is missing, or this process has fewer CPU
                devices already.
        """
        if self.switched:
            return gpus.gpu_devices(self.kind, self.chips_per_slice, self.slices)
        return _cpu_devices(self) if self.kind == "cpu" else _tpu_devices(self)

    def slices_of(self, devices: Iterable[jax.Device]) -> list[int]:
        """The slice, or the host of GPUs, of each device."""
        if self.switched:
            return [device.process_index for device in devices]
        return slice_of(devices)


def _cpu_devices(topology: Topology) -> list[jax.Device]:
    number = topology.chips_per_slice
    # Read when the first backend starts; a process that has one keeps its devices.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        flag = f"--xla_force_host_platform_device_count={number}"
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
    devices = jax.devices("cpu")
    if len(devices) < number:
        raise InputError(
            f"--topology={topology}: this process has {len(devices)} CPU devices; set XLA_FLAGS="
            f"--xla_force_host_platform_device_count={number}, or choose a smaller topology"
        )
    return devices[:number]


@functools.cache
def _tpu_devices(topology: Topology) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology={topology} needs libtpu, which compiles for TPUs on any Linux machine; "
            f"install it with: {INSTALL_LIBTPU}"
        )
    described = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{topology.kind}-{topology.chips_per_slice}",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # Without a chip there is nothing to lock: several plans may be made at a time.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for name, value in described.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.kind in ("v4", "v5p"):
        # One device per chip, as JAX has it on the real ones; the default for v4 is two.
        options["chip_config_name"] = "megacore"
    if topology.chips_per_slice == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{topology.kind}:{'x'.join(map(str, topology.shape))}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
