"""One shard of a table on the host: whose it is, and where its rows lie."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from stem_jax.tables.kept_rows import KeptRows
from stem_jax.tables.spec import TableSpec
from stem_jax.tables.store_snapshot import NUMBERS

Arrays = dict[str, np.ndarray]


class Tier(Protocol):
    """Rows of a block that lie elsewhere than in its arrays, see `RowTiers`."""

    def gather(
        self, rows: np.ndarray, out: Arrays, make: Callable[[np.ndarray], Arrays]
    ) -> None: ...

    def write(self, rows: np.ndarray, values: Arrays) -> None: ...


@dataclasses.dataclass(frozen=True, eq=False)
class HostBlock:
    """One shard of a table: a range of rows by a range of columns.

    Attributes:
        index: in the store's `blocks`.
        shard: number of the row shard along the spec's vocab_axes.
        row_range, column_range: of the whole table.
        devices: of this process, that hold the shard on the device side.
        saves: fields that this process writes to a checkpoint; shards that several processes have
            are written by the one with the lowest device.
        saves_rest: whether it writes what belongs to these rows whatever their columns.
        arrays: by field, [rows, S, columns] or [rows]; see `TableSpec.fields`.
        kept: which rows lie in the arrays, and where; None: all, each at its own number.
        tier: has the rows in place of the arrays, which have none.
    """

    index: int
    shard: int
    row_range: range
    column_range: range
    devices: tuple[jax.Device, ...]
    saves: frozenset[str]
    saves_rest: bool
    arrays: Arrays = dataclasses.field(repr=False)
    kept: KeptRows | None = dataclasses.field(default=None, repr=False)
    tier: Tier | None = dataclasses.field(default=None, repr=False)

    @property
    def saved(self) -> frozenset[str]:
        """`saves`, and the numbers of the rows."""
        return self.saves | ({NUMBERS} if self.saves_rest else frozenset())

    @property
    def count(self) -> int:
        """Rows that lie in the arrays, at their first places."""
        return len(self.row_range) if self.kept is None else self.kept.count

    def places(self, rows: np.ndarray) -> np.ndarray:
        """[n] where distinct rows [n] int64 of this block lie, which are kept from now on."""
        return rows if self.kept is None else self.kept.places(rows)

    def used(self) -> Arrays:
        """The arrays as far as rows lie in them, and, of some rows alone, their `NUMBERS`."""
        if self.kept is None:
            return self.arrays
        used = {NUMBERS: self.kept.numbers, **self.arrays}
        return {name: array[: self.kept.count] for name, array in used.items()}


def local_blocks(spec: TableSpec, mesh: Mesh) -> list[HostBlock]:
    """The distinct shards on this process's devices, without memory."""
    shape = spec.shape("rows")
    sharding = NamedSharding(mesh, spec.logical_spec)
    holders: dict[tuple[range, range], list[jax.Device]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        rows, _, columns = (
            range(*part.indices(size)) for part, size in zip(index, shape, strict=True)
        )
        holders.setdefault((rows, columns), []).append(device)
    lowest = {ranges: min(device.id for device in found) for ranges, found in holders.items()}
    blocks: list[HostBlock] = []
    for rows, columns in sorted(holders, key=lambda ranges: (ranges[0].start, ranges[1].start)):
        devices = holders[rows, columns]
        local = tuple(d for d in devices if d.process_index == jax.process_index())
        if not local:
            continue
        ids = {device.id for device in local}
        whole = lowest[rows, columns] in ids
        # What has no columns: of all shards with these rows, one writes it.
        first = min(device for (r, _), device in lowest.items() if r == rows) in ids
        saves = {f.name for f in spec.fields if (whole if "F" in f.axes else first)}
        shard = rows.start // len(rows)
        blocks.append(
            HostBlock(len(blocks), shard, rows, columns, local, frozenset(saves), first, {})
        )
    return blocks


def owners_here(spec: TableSpec, mesh: Mesh) -> list[list[int]]:
    """The owners of which this process has devices: those together that the same processes hold."""
    sharding = NamedSharding(mesh, spec.index_spec)
    holders: dict[int, set[int]] = {}
    places: dict[Any, Any] = dict(sharding.devices_indices_map((spec.num_rows,)))
    for device, (rows,) in places.items():
        first, end, _ = rows.indices(spec.num_rows)
        holders.setdefault(first // (end - first), set()).add(device.process_index)
    groups: dict[frozenset[int], list[int]] = {}
    for owner in sorted(holders):
        if jax.process_index() in holders[owner]:
            groups.setdefault(frozenset(holders[owner]), []).append(owner)
    return list(groups.values())
