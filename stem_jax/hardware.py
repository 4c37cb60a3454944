"""Published peak figures of accelerators, for MFU and rooflines. Sources stand beside them."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one device.

    flops: dense bf16 matmul FLOP/s. hbm_bytes: what programs may use; on TPUs the limit that
    libtpu's compiler enforces, the capacity less what the runtime reserves. hbm_bandwidth: bytes/s.
    links: interconnect links of a chip. link_bandwidth: bytes/s of a link in one direction.
    network: bytes/s of a chip into the data-centre network between slices or hosts, in one
    direction; None where no figure is published. clock: cycles/s of a TPU's cores, which follow
    from the peak: a matrix unit of 128 x 128 (v6e: 256 x 256) starts as many products a cycle; 0
    where the account of a step does not reach. cores: of a device. reserved: hbm_bytes are this
    share of the device's memory, which a run takes at its start; 1 where they are all there is.
    elements: results/s of float32 arithmetic outside the matmuls; 0 where not needed. float8: dense
    matmul FLOP/s of 8-bit floats; 0 where a chip has no units for them. host_memory: bytes of its
    host for each of its chips; host_link: bytes/s between that and a chip, each way; None where no
    figure is published.
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
    reserved: float = 1.0
    elements: float = 0.0
    float8: float = 0.0
    host_memory: float | None = None
    host_link: float | None = None

    @property
    def interconnect(self) -> float:
        """Bytes/s out of a chip over all its links."""
        return self.links * self.link_bandwidth

    def peak(self, matmul_dtype: str | None) -> float:
        """Matmul FLOP/s of a model's `matmul_dtype`, by which its utilisation is measured."""
        return self.float8 if matmul_dtype == "float8" and self.float8 else self.flops


_GIB = 2**30
# XLA_PYTHON_CLIENT_MEM_FRACTION of a GPU's memory, its default.
_RESERVED = 0.75


def _gpu(name, flops, memory, bandwidth, links, network, float32, source) -> Chip:
    """flops: of bf16 and of 8-bit floats, dense: half of what datasheets state with sparsity.
    memory: bytes that the driver reports (openxla/xla, xla/backends/gpu/target_config/specs).
    float32: FLOP/s without tensor cores, two of each result.
    """
    bfloat16, float8 = flops
    # A DGX has 2 TB for eight GPUs; PCIe of 16 lanes, in A100's day of half the speed.
    host_link = 32e9 if name == "A100" else 64e9
    return Chip(
        f"NVIDIA {name}",
        bfloat16,
        _RESERVED * memory,
        bandwidth,
        links[0],
        links[1],
        network,
        f"NVIDIA {source} datasheet",
        reserved=_RESERVED,
        elements=float32 / 2,
        float8=float8,
        host_memory=2e12 / 8,
        host_link=host_link,
    )


def _tpu(host, name, flops, memory, bandwidth, links, network, page, clock, cores=1) -> Chip:
    """host: its memory for each chip, of a machine as Google Cloud states it, and the link there.
    Of links Google states nothing; jax-ml.github.io/scaling-book/tpus has "typically around" 15
    GB/s, and of v6e 32. memory: GiB.
    """
    return Chip(
        f"TPU {name}",
        flops,
        memory * _GIB,
        bandwidth,
        links[0],
        links[1],
        network,
        f"docs.cloud.google.com/tpu/docs/{page}",
        clock,
        cores,
        host_memory=host[0],
        host_link=host[1],
    )


CHIPS = (
    # Link figures of v4 follow from its bisection: 24 TB/s over the 512 links of a 16x16x16 pod.
    _tpu((None, 15e9), "v4", 275e12, 30.75, 1.2e12, (6, 50e9), None, "v4", 1.05e9, 2),
    # Network: 6.4 Tbps for the 256 chips of a pod. 512 GiB for eight chips.
    _tpu((64 * _GIB, 15e9), "v5 lite", 197e12, 15.75, 819e9, (4, 50e9), 3.125e9, "v5e", 1.5e9),
    # 448 GB for four.
    _tpu((112e9, 15e9), "v5", 459e12, 95.74, 2765e9, (6, 100e9), 6.25e9, "v5p", 1.75e9, 2),
    # 1,536 GiB for eight.
    _tpu((192 * _GIB, 32e9), "v6 lite", 918e12, 31.25, 1638e9, (4, 100e9), None, "v6e", 1.75e9),
    _gpu("A100", (312e12, 0), 80e9, 2.0e12, (12, 25e9), None, 19.5e12, "A100 80GB"),
    # GPUs of a host are joined by switches at the speed of all their links. Each has a network
    # adapter of 400 Gb/s (NVIDIA DGX H100/H200 and DGX B200 user guides).
    _gpu("H100", (989e12, 1979e12), 84_942_979_072, 3.35e12, (18, 25e9), 50e9, 67e12, "H100 SXM"),
    _gpu("H200", (989e12, 1979e12), 151_397_597_184, 4.8e12, (18, 25e9), 50e9, 67e12, "H200"),
    # HGX B200, eight of them: with sparsity 36 PFLOP/s of bf16 and 72 of 8-bit floats; 62 TB/s, 600
    # TFLOP/s of float32.
    _gpu("B200", (2250e12, 4500e12), 191_514_411_008, 7.7e12, (18, 50e9), 50e9, 75e12, "HGX B200"),
)


def chip_of(device: jax.Device) -> Chip | None:
    """Peak figures of a device; None where they are unknown, as for CPUs."""
    kind = device.device_kind
    # The longest name first: "TPU v5 lite" begins with "TPU v5".
    for chip in sorted(CHIPS, key=lambda c: -len(c.name)):
        if kind.startswith(chip.name):
            return chip
    return None
