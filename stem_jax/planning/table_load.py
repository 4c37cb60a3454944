"""What a table costs a pod: where its rows lie, and what a step moves of them.

All of it follows from sizes, by formulas that stand in docs/planning.md; nothing is compiled or
made. Times are lower bounds at the peak figures of the chip, but for that of the books.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding

from stem_jax.config import Config
from stem_jax.hardware import Chip
from stem_jax.mesh import AXES, TOKEN_AXES, axis_size, live_axes
from stem_jax.planning.collectives import Collective
from stem_jax.planning.distinct_rows import DistinctRows
from stem_jax.planning.ring import crossing_share, sent_bytes
from stem_jax.planning.roofline import ici_seconds, network_seconds
from stem_jax.planning.topology import Topology
from stem_jax.tables.exchange import Exchange
from stem_jax.tables.sharded_table import ShardedTable
from stem_jax.tables.spec import TableSpec

DEVICE, HOST, DISK = "device", "host", "disk"
# A row's number, and the count of its tokens.
_INT = 4
# Of a row in `RowCache.assign`: 118,000 of 625,000 rows with 262,144 slots took 10 to 63 ms on a
# core of an EPYC, 18 in the middle. No bound, as the times at peak figures are.
_BOOK_SECONDS = 1.5e-7


@dataclasses.dataclass(frozen=True)
class Tier:
    """One kind of place where rows lie.

    rows: of all places together, copies counted once. places: devices or hosts. bytes: of rows and
    moments in the fullest place. total: of all places. capacity: bytes of memory that a place has;
    None where unknown.
    """

    rows: int
    places: int
    bytes: int
    total: int
    capacity: int | None


@dataclasses.dataclass(frozen=True)
class TableLoad:
    """Figures are per device and step unless they say otherwise.

    num_rows: V_pad. parameters: without padding rows. row_bytes: of a row with its moments. tiers:
    where rows lie, the fastest first. keys: of all devices. distinct_step, distinct_device,
    distinct_owner: rows that these ask for: all devices, one, and all of one owner. origin: how
    that is known. slots_needed: the least `resident_rows` for such a step; 0 if all are resident.
    hit_rate: of the rows asked for, the share that is in its slot already; 1 likewise.
    interconnect_bytes, network_bytes: sent within and between slices. exchange_bytes: of these what
    the rows take, there and back, padding included; the rest tells who wants which.
    entering_bytes, leaving_bytes: between host memory and a device, of the busiest device of a
    host. booked_rows: whose slots a process finds: those asked of its own owners, in the process
    that has most. Seconds: None where a peak figure is not known.
    """

    num_rows: int
    parameters: int
    row_bytes: int
    tiers: dict[str, Tier]
    keys: int
    distinct_step: int
    distinct_device: int
    distinct_owner: int
    origin: str
    slots_needed: int
    hit_rate: float
    exchange_bytes: int
    interconnect_bytes: int
    network_bytes: int
    entering_bytes: int
    leaving_bytes: int
    booked_rows: int
    interconnect_seconds: float | None
    network_seconds: float | None
    link_seconds: float | None
    books_seconds: float


def table_load(
    table: ShardedTable,
    config: Config,
    topology: Topology,
    chip: Chip | None,
    distinct: DistinctRows,
    hit_rate: float | None,
) -> TableLoad:
    """The load of one table.

    Args:
        table: with the sizes of the exchange.
        chip: None where nothing is known of it.
        hit_rate: see `TableLoad`; None: the share of the rows that have slots, as if all were asked
            for equally often.
    """
    spec, mesh = table.spec, table.mesh
    owners = axis_size(mesh, spec.vocab_axes)
    devices = axis_size(mesh, TOKEN_AXES)
    itemsize = 2 if config.model.compute_dtype == "bfloat16" else 4
    rows = _row_collectives(table.exchange, spec, mesh, topology, itemsize)
    sent = rows + _number_collectives(table, topology)
    step = distinct.of(devices)
    owned = step / owners
    entering = leaving = booked = 0
    hits = 1.0
    if spec.offloaded:
        hits = spec.num_slots / spec.num_rows if hit_rate is None else hit_rate
        entering = round(owned * (1 - hits) * _bytes_of_block(spec, mesh, 1))
        # What leaves makes room for what enters. Of each owner a device tells what it is asked for.
        leaving = entering + _listed(table) * 2 * _INT
        booked = round(owned * _owners_of_process(spec, mesh))
    seconds: dict[str, float | None] = dict.fromkeys(("interconnect", "network", "link"))
    if chip is not None:
        seconds["interconnect"] = sum(ici_seconds(c, topology, chip) for c in sent)
        between = sum(c.between for c in sent)
        if chip.network is not None or not between:
            seconds["network"] = sum(network_seconds(c, chip) for c in sent)
        if chip.host_link is not None:
            # Both ways at a time.
            seconds["link"] = max(entering, leaving) / chip.host_link
    return TableLoad(
        num_rows=spec.num_rows,
        parameters=spec.num_parameters,
        row_bytes=spec.row_bytes(),
        tiers=_tiers(spec, mesh, chip),
        keys=distinct.keys * devices,
        distinct_step=round(step),
        distinct_device=round(distinct.of(1)),
        distinct_owner=round(owned),
        origin=distinct.origin,
        slots_needed=owners * math.ceil(owned) if spec.offloaded else 0,
        hit_rate=hits,
        exchange_bytes=round(sum(c.total for c in rows)),
        interconnect_bytes=round(sum(c.total - c.between for c in sent)),
        network_bytes=round(sum(c.between for c in sent)),
        entering_bytes=entering,
        leaving_bytes=leaving,
        booked_rows=booked,
        books_seconds=booked * _BOOK_SECONDS,
        **{f"{wire}_seconds": value for wire, value in seconds.items()},
    )


def _tiers(spec: TableSpec, mesh: Mesh, chip: Chip | None) -> dict[str, Tier]:
    on_device = sum(array.device_bytes(mesh) for array in spec.placed())
    size, room = mesh.devices.size, None if chip is None else int(chip.hbm_bytes)
    tiers = {DEVICE: Tier(spec.num_slots, size, on_device, size * on_device, room)}
    if spec.offloaded:
        in_memory = spec.num_rows if spec.host_rows is None else spec.host_rows
        sizes = host_bytes(spec, mesh, in_memory)
        most = max(sizes, key=sizes.__getitem__)
        chips = sum(device.process_index == most for device in mesh.devices.flat)
        room = None
        if chip is not None and chip.host_memory is not None:
            room = int(chips * chip.host_memory)
        tiers[HOST] = Tier(in_memory, len(sizes), sizes[most], sum(sizes.values()), room)
        if spec.on_disk:
            sizes = host_bytes(spec, mesh, spec.num_rows)
            tiers[DISK] = Tier(spec.num_rows, len(sizes), sizes[most], sum(sizes.values()), None)
    return tiers


def host_bytes(spec: TableSpec, mesh: Mesh, num_rows: int) -> dict[int, int]:
    """Bytes that so many rows of a table take in each process, once all have been written.

    A process has the shards of its devices, each once.
    """
    shape = spec.shape("rows")
    sharding = NamedSharding(mesh, spec.logical_spec)
    places: dict[Any, Any] = dict(sharding.devices_indices_map(shape))
    blocks: dict[int, set[Any]] = {}
    for device, index in places.items():
        block = tuple((part.start, part.stop) for part in index)
        blocks.setdefault(device.process_index, set()).add(block)
    rows = num_rows // axis_size(mesh, spec.vocab_axes)
    size = _bytes_of_block(spec, mesh, rows)
    return {process: len(own) * size for process, own in blocks.items()}


def _owners_of_process(spec: TableSpec, mesh: Mesh) -> int:
    """Owners that the process with most of them holds; copies of a shard are one."""
    places: dict[Any, Any] = dict(
        NamedSharding(mesh, spec.index_spec).devices_indices_map((spec.num_rows,))
    )
    own: dict[int, set[Any]] = {}
    for device, (rows,) in places.items():
        own.setdefault(device.process_index, set()).add((rows.start, rows.stop))
    return max(map(len, own.values()))


def _bytes_of_block(spec: TableSpec, mesh: Mesh, rows: int) -> int:
    """Bytes of so many rows of a shard, with their moments."""
    columns = spec.width // mesh.shape["tensor"]
    return sum(
        math.prod(spec.shape(field.name, rows, columns)) * np.dtype(field.dtype).itemsize
        for field in spec.fields
    )


def _listed(table: ShardedTable) -> int:
    """N: rows that `ShardedTable.demand` lists of an owner for its host, with room to spare."""
    owners = axis_size(table.mesh, table.spec.vocab_axes)
    copies = axis_size(table.mesh, TOKEN_AXES) // owners
    return min(table.largest_sizes.owned, 2 * copies * table.keys_per_device)


def _row_collectives(
    exchange: Exchange, spec: TableSpec, mesh: Mesh, topology: Topology, itemsize: int
) -> list[Collective]:
    """Of `Exchange.fetch` and `Exchange.push`."""
    numbers = spec.row_size // mesh.shape["tensor"]
    found = []
    for place, slots in enumerate(exchange.slots):
        # Relays send their sums on in float32.
        back = itemsize if place == 0 else 4
        read = slots * numbers * (itemsize + back)
        found.append(_of_hop(exchange, place, read, mesh, topology))
    copies = _groups(mesh, live_axes(mesh, *exchange.copy_axes))
    if copies.shape[1] > 1:
        sums = exchange.owned_rows * numbers * 4
        found += _of_ring("all-reduce", sums, mesh, copies, topology)
    return found


def _number_collectives(table: ShardedTable, topology: Topology) -> list[Collective]:
    """Of `Exchange.request` in the step, and of `ShardedTable.demand` before it."""
    exchange, spec, mesh = table.exchange, table.spec, table.mesh
    room = dataclasses.replace(table, sizes=None).exchange
    found = []
    for place in range(len(exchange.hops)):
        read = exchange.slots[place] * _INT
        # Counts of tokens go along for the hosts alone.
        read += room.slots[place] * _INT * (2 if spec.offloaded else 1)
        found.append(_of_hop(exchange, place, read, mesh, topology))
    copies = _groups(mesh, live_axes(mesh, *exchange.copy_axes))
    if copies.shape[1] > 1:
        asked = exchange.owned_rows + room.owned_rows * (2 if spec.offloaded else 1)
        found += _of_ring("all-gather", asked * _INT, mesh, copies, topology)
    return found


def _of_hop(exchange: Exchange, place: int, read: int, mesh, topology: Topology) -> Collective:
    hop = exchange.hops[place]
    owners = _groups(mesh, exchange.vocab_axes)[0]
    slices = topology.slices_of(mesh.devices.flat)
    crossing = max(
        crossing_share("all-to-all", [slices[owners[owner]] for owner in group])
        for group in hop.groups(exchange.num_owners)
    )
    sent = sent_bytes("all-to-all", read, hop.peers)
    return Collective("all-to-all", f"hop {place}", "", sent, 1, hop.peers, crossing)


def _of_ring(
    kind: str, read: int, mesh: Mesh, groups: np.ndarray, topology: Topology
) -> list[Collective]:
    """What a ring sends within slices, and what it sends between them."""
    slices = topology.slices_of(mesh.devices.flat)
    size = groups.shape[1]
    crossing = max(crossing_share(kind, [slices[d] for d in group]) for group in groups)
    sent = sent_bytes(kind, read, size)
    parts = ((sent * (1 - crossing), 0.0), (sent * crossing, 1.0))
    return [Collective(kind, kind, "", part, 1, size, share) for part, share in parts if part]


def _groups(mesh: Mesh, axes: tuple[str, ...]) -> np.ndarray:
    """[groups, size] numbers of devices in the mesh: those that differ along these axes alone."""
    numbers = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
    others = [place for place, axis in enumerate(AXES) if axis not in axes]
    along = [AXES.index(axis) for axis in axes]
    return numbers.transpose(*others, *along).reshape(-1, axis_size(mesh, axes))
