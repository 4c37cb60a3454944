"""Published peak figures of accelerators, for MFU and rooflines. Sources stand beside them."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one device.

    flops: dense bf16 matmul FLOP/s. hbm_bytes: bytes. hbm_bandwidth: bytes/s.
    interconnect: bytes/s over all links of a chip, both directions together.
    """

    name: str
    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    interconnect: float
    source: str


_TPU = "cloud.google.com/tpu/docs, system architecture pages"
_NVIDIA = "NVIDIA datasheet"
CHIPS = (
    Chip("TPU v4", 275e12, 32 * 2**30, 1.2e12, 2.4e12 / 8, _TPU),
    Chip("TPU v5 lite", 197e12, 16 * 2**30, 0.82e12, 1.6e12 / 8, _TPU),
    Chip("TPU v5", 459e12, 95 * 2**30, 2.765e12, 4.8e12 / 8, _TPU),
    Chip("TPU v6 lite", 918e12, 32 * 2**30, 1.64e12, 3.584e12 / 8, _TPU),
    Chip("NVIDIA A100", 312e12, 80e9, 2.0e12, 600e9, _NVIDIA),
    Chip("NVIDIA H100", 989e12, 80e9, 3.35e12, 900e9, _NVIDIA),
    Chip("NVIDIA H200", 989e12, 141e9, 4.8e12, 900e9, _NVIDIA),
)


def chip_of(device: jax.Device) -> Chip | None:
    """Peak figures of a device; None where they are unknown, as for CPUs."""
    kind = device.device_kind
    # The longest name first: "TPU v5 lite" begins with "TPU v5".
    for chip in sorted(CHIPS, key=lambda c: -len(c.name)):
        if kind.startswith(chip.name):
            return chip
    return None
