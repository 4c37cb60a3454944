"""A plan of the tables alone: by their arithmetic, without compiling a step."""

import dataclasses

from jax.sharding import Mesh

from stem_jax.config import Config
from stem_jax.errors import InputError
from stem_jax.hardware import Chip, chip_of
from stem_jax.memory.catalogue import table_specs, with_eos
from stem_jax.mesh import AXES, check_placement, make_mesh
from stem_jax.planning.distinct_rows import DistinctRows, step_distinct_rows
from stem_jax.planning.program import check_batch, planned_tables
from stem_jax.planning.roofline import matmul_seconds, step_flops
from stem_jax.planning.table_load import HOST, TableLoad, table_load
from stem_jax.planning.topology import Topology
from stem_jax.tables.sharded_table import ShardedTable
from stem_jax.tables.spec import TableSpec, check_host_rows

# What tables need beside the matmuls, by its name in a plan.
WIRES = ("interconnect", "network", "link", "books")


@dataclasses.dataclass(frozen=True)
class TableBytes:
    """Bytes of one chip for a table: parameters; mu, nu and last_step; the step's row block;
    one of the exchange's padded buffers. unique_rows: room in the row block. owned_rows: room for
    what an owner is asked. Zeros without an exchange. host: bytes in the memory of all hosts
    together; 0 if all rows are resident. load: of a step; None without an exchange.
    """

    rows: int
    moments: int
    unique_rows: int
    owned_rows: int
    row_block: int
    exchange: int
    host: int = 0
    load: TableLoad | None = None


@dataclasses.dataclass(frozen=True)
class TableBounds:
    """Seconds per step, see `Roofline`: of all matmuls, and of what all tables need. None where a
    peak figure is not known. binds: the largest.
    """

    compute: float
    interconnect: float | None
    network: float | None
    link: float | None
    books: float | None
    binds: str


@dataclasses.dataclass(frozen=True)
class TablesPlan:
    """As `Plan` has it. hosts: processes. bounds: None where nothing is known of the chip."""

    program: str
    topology: str
    device_kind: str
    chips: int
    hosts: int
    mesh: dict[str, int]
    tokens_per_step: int
    tables: dict[str, TableBytes]
    model_flops: int
    all_flops: int
    bounds: TableBounds | None
    peaks: Chip | None
    fits: bool
    remedies: tuple[str, ...]


def plan_tables(
    config: Config,
    topology: Topology,
    all_distinct: bool = False,
    hit_rate: float | None = None,
) -> TablesPlan:
    """The tables of a run on a topology; takes seconds.

    Args:
        all_distinct: as `program.train_step_program` has it.
        hit_rate: as `table_load.table_load` has it, of each memory.

    Raises:
        InputError: the topology cannot be described, or the configuration does not suit it.
    """
    mesh = make_mesh(config.mesh, topology.devices())
    chip = chip_of(mesh.devices.flat[0])
    check_batch(config, mesh)
    distinct = step_distinct_rows(config, mesh)
    # As in `make_plan`.
    config = with_eos(config, 0)
    specs = table_specs(config)
    placed = [array for spec in specs.values() for array in spec.placed()]
    check_placement(placed, mesh, config.mesh.max_replicated_mib)
    check_host_rows(specs.values(), mesh)
    planned = planned_tables(config, mesh, distinct, all_distinct=all_distinct)
    tables = tables_bytes(config, topology, mesh, planned, distinct, hit_rate)
    model_flops, all_flops = step_flops(config)
    return TablesPlan(
        program="tables alone",
        topology=str(topology),
        device_kind=mesh.devices.flat[0].device_kind,
        chips=mesh.devices.size,
        hosts=len({device.process_index for device in mesh.devices.flat}),
        mesh={axis: mesh.shape[axis] for axis in AXES},
        tokens_per_step=config.tokens_per_step,
        tables=tables,
        model_flops=model_flops,
        all_flops=all_flops,
        bounds=None if chip is None else _bounds(config, mesh, chip, tables),
        peaks=chip,
        fits=not overfull(tables),
        remedies=table_remedies(tables, specs),
    )


def tables_bytes(
    config: Config,
    topology: Topology,
    mesh: Mesh,
    planned: dict[str, ShardedTable],
    distinct: dict[str, DistinctRows],
    hit_rate: float | None = None,
) -> dict[str, TableBytes]:
    """Each table's, of a step with these exchanges; of one without, what it has of rows.

    Raises:
        InputError: a hit rate that is none.
    """
    if hit_rate is not None and not 0 <= hit_rate <= 1:
        raise InputError(f"--hit-rate={hit_rate} must be from 0 to 1, a share of a step's rows")
    chip = chip_of(mesh.devices.flat[0])
    found = {}
    for name, spec in table_specs(config).items():
        rows, *moments = (array.device_bytes(mesh) for array in spec.placed())
        if name not in planned:
            found[name] = TableBytes(rows, sum(moments), 0, 0, 0, 0)
            continue
        table = planned[name]
        exchange = table.exchange
        row = spec.row_size // mesh.shape["tensor"]
        row *= 2 if config.model.compute_dtype == "bfloat16" else 4
        load = table_load(table, config, topology, chip, distinct[name], hit_rate)
        found[name] = TableBytes(
            rows=rows,
            moments=sum(moments),
            unique_rows=exchange.unique_rows,
            owned_rows=exchange.owned_rows,
            row_block=exchange.unique_rows * row,
            exchange=exchange.buffer_bytes(row // spec.vectors),
            host=load.tiers[HOST].total if HOST in load.tiers else 0,
            load=load,
        )
    return found


def overfull(tables: dict[str, TableBytes]) -> dict[str, tuple[int, int]]:
    """Tiers without room for all tables: bytes of the fullest place, and the memory that it has."""
    found = {}
    loads = [table.load for table in tables.values() if table.load is not None]
    for name in dict.fromkeys(name for load in loads for name in load.tiers):
        tiers = [load.tiers[name] for load in loads if name in load.tiers]
        needed, room = sum(tier.bytes for tier in tiers), tiers[0].capacity
        if room is not None and needed > room:
            found[name] = (needed, room)
    return found


def table_remedies(tables: dict[str, TableBytes], specs: dict[str, TableSpec]) -> tuple[str, ...]:
    """What to change where tables do not fit, the most likely first."""
    tiers = overfull(tables)
    found = []
    if HOST not in tiers and tiers:
        keys = (spec.resident_key for spec in specs.values())
        found.append(f"fewer {' and '.join(keys)}, which keeps the other rows in host memory")
    if tiers:
        found += ["a larger topology", "row_format=bfloat16 and moments=rowwise of the tables"]
        sizes = dict.fromkeys(key for spec in specs.values() for key in spec.size_keys)
        found.append(f"lower {', '.join(sizes)}")
    return tuple(found)


def _bounds(config: Config, mesh: Mesh, chip: Chip, tables: dict[str, TableBytes]) -> TableBounds:
    compute = matmul_seconds(config, mesh.devices.size, chip)
    wires = {name: total_seconds(tables, name) for name in WIRES}
    known = {"compute": compute, **{n: value for n, value in wires.items() if value is not None}}
    return TableBounds(compute, **wires, binds=max(known, key=known.__getitem__))


def total_seconds(tables: dict[str, TableBytes], wire: str) -> float | None:
    """Of all tables on one of the `WIRES`; None where one is not known."""
    loads = [table.load for table in tables.values() if table.load is not None]
    parts = [getattr(load, f"{wire}_seconds") for load in loads]
    return None if None in parts else sum(parts)
