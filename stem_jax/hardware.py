"""Published peak figures of accelerators, for MFU and rooflines. Sources stand beside them."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one device.

    flops: dense bf16 matmul FLOP/s. hbm_bytes: what programs may use; on TPUs the limit that
    libtpu's compiler enforces, the capacity less what the runtime reserves. hbm_bandwidth: bytes/s.
    links: interconnect links of a chip. link_bandwidth: bytes/s of a link in one direction.
    network: bytes/s of a chip into the data-centre network between slices, in one direction; None
    where no figure is published. clock: cycles/s of a TPU's cores, which follow from the peak: a
    matrix unit of 128 x 128 (v6e: 256 x 256) starts as many products a cycle; 0 where the account
    of a step does not reach. cores: of a device.
    """

    name: str
    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    links: int
    link_bandwidth: float
    network: float | None
    source: str
    clock: float = 0.0
    cores: int = 1

    @property
    def interconnect(self) -> float:
        """Bytes/s out of a chip over all its links."""
        return self.links * self.link_bandwidth


_TPU = "docs.cloud.google.com/tpu/docs/"
_GIB = 2**30
CHIPS = (
    # Link figures of v4 follow from its bisection: 24 TB/s over the 512 links of a 16x16x16 pod.
    Chip("TPU v4", 275e12, 30.75 * _GIB, 1.2e12, 6, 50e9, None, _TPU + "v4", 1.05e9, 2),
    # Network: 6.4 Tbps for the 256 chips of a pod.
    Chip("TPU v5 lite", 197e12, 15.75 * _GIB, 819e9, 4, 50e9, 3.125e9, _TPU + "v5e", 1.5e9),
    Chip("TPU v5", 459e12, 95.74 * _GIB, 2765e9, 6, 100e9, 6.25e9, _TPU + "v5p", 1.75e9, 2),
    Chip("TPU v6 lite", 918e12, 31.25 * _GIB, 1638e9, 4, 100e9, None, _TPU + "v6e", 1.75e9),
    Chip("NVIDIA A100", 312e12, 80e9, 2.0e12, 12, 25e9, None, "NVIDIA A100 80GB datasheet"),
    Chip("NVIDIA H100", 989e12, 80e9, 3.35e12, 18, 25e9, None, "NVIDIA H100 SXM datasheet"),
    Chip("NVIDIA H200", 989e12, 141e9, 4.8e12, 18, 25e9, None, "NVIDIA H200 datasheet"),
)


def chip_of(device: jax.Device) -> Chip | None:
    """Peak figures of a device; None where they are unknown, as for CPUs."""
    kind = device.device_kind
    # The longest name first: "TPU v5 lite" begins with "TPU v5".
    for chip in sorted(CHIPS, key=lambda c: -len(c.name)):
        if kind.startswith(chip.name):
            return chip
    return None
