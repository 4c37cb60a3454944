"""Lower bounds of a step's time: what the cores, the HBM and the links must do at the least."""

import dataclasses
import math

from stem_jax.config import Config
from stem_jax.hardware import Chip
from stem_jax.model.cost import (
    forward_flops_per_token,
    projection_flops_per_token,
    training_flops_per_token,
)
from stem_jax.planning.collectives import Collective
from stem_jax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds per step if nothing else took time, and what follows for the throughput.

    compute: all matmuls, recomputation included. hbm: traffic with the chip's memory. interconnect:
    collectives within slices. network: collectives between slices. link: rows between host memory
    and the chip, of tables that are not resident. books: of their slots, on the host; what a core
    took, and no bound. step: the largest of them; binds: its name.
    tokens_per_second: of the whole pod. mfu: model FLOPs (no recomputation) over the peak, that of
    8-bit floats where projections multiply them.
    """

    compute: float
    hbm: float
    interconnect: float
    network: float
    link: float
    books: float
    step: float
    binds: str
    tokens_per_second: float
    mfu: float


def step_flops(config: Config) -> tuple[int, int]:
    """Matmul FLOPs of a step on all devices: the model's, and with what is recomputed."""
    model, seq_len = config.model, config.train.seq_len
    flops = training_flops_per_token(config, seq_len)
    # The loss takes its gradient in the forward pass, so remat never repeats the head.
    blocks = forward_flops_per_token(config, seq_len) - 2 * model.vocab_size * model.embed_dim
    scores = 4 * seq_len * model.num_heads * model.head_dim * model.num_layers
    again = {"full": blocks, "attention": blocks - scores, "dots": scores}.get(model.remat, 0)
    return flops * config.tokens_per_step, (flops + again) * config.tokens_per_step


def _float8_flops(config: Config) -> int:
    """Of those with what is recomputed, the products of 8-bit floats."""
    model = config.model
    if model.matmul_dtype != "float8":
        return 0
    passes = 4 if model.remat in ("full", "attention") else 3
    return passes * projection_flops_per_token(config) * config.tokens_per_step


def matmul_seconds(config: Config, chips: int, chip: Chip) -> float:
    """Of all matmuls of a step, recomputation included, at the chips' peak."""
    _, all_flops = step_flops(config)
    small = _float8_flops(config)
    return ((all_flops - small) / chip.flops + small / chip.peak(config.model.matmul_dtype)) / chips


def roofline(
    config: Config,
    topology: Topology,
    chip: Chip,
    collectives: list[Collective],
    hbm_bytes: int,
    link: float = 0.0,
    books: float = 0.0,
) -> Roofline:
    """The bounds for a compiled step.

    Args:
        collectives: of one chip and step.
        hbm_bytes: bytes of one chip and step.
        link, books: see `Roofline`; 0 where it is not known.
    """
    chips = topology.chips_per_slice * topology.slices
    model_flops, _ = step_flops(config)
    peak = chip.peak(config.model.matmul_dtype)
    seconds = {
        "compute": matmul_seconds(config, chips, chip),
        "hbm": hbm_bytes / chip.hbm_bandwidth,
        "interconnect": sum(ici_seconds(c, topology, chip) for c in collectives),
        "network": sum(network_seconds(c, chip) for c in collectives),
        "link": link,
        "books": books,
    }
    binds = max(seconds, key=seconds.__getitem__)
    step = seconds[binds]
    return Roofline(
        **seconds,
        step=step,
        binds=binds,
        tokens_per_second=config.tokens_per_step / step,
        mfu=model_flops / (step * chips * peak),
    )


def ici_seconds(collective: Collective, topology: Topology, chip: Chip) -> float:
    """At least the bytes over the links of the chip that has fewest: a corner, without rings.

    An all-to-all of a whole slice also crosses its middle: half of what every chip sends, over the
    links that join the halves of the longest dimension. Of GPUs what stays inside a host, at the
    speed of all links.
    """
    if topology.switched:
        return (collective.total - collective.between) / chip.interconnect
    if collective.crossing:
        return 0.0
    shape, wraps = topology.shape, topology.wraps
    links = sum(2 if ring else 1 for size, ring in zip(shape, wraps, strict=True) if size > 1)
    seconds = collective.total / (max(links, 1) * chip.link_bandwidth)
    if collective.kind == "all-to-all" and collective.group >= topology.chips_per_slice:
        longest = max(shape)
        ring = wraps[shape.index(longest)]
        across = math.prod(shape) // longest * (2 if ring and longest > 2 else 1)
        half = collective.total * topology.chips_per_slice / 4
        seconds = max(seconds, half / (across * chip.link_bandwidth))
    return seconds


def network_seconds(collective: Collective, chip: Chip) -> float:
    """Of the bytes that go from slice to slice; 0 where the network's speed is not known."""
    return 0.0 if chip.network is None else collective.between / chip.network
