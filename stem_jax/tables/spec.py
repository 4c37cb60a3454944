"""What a table is: size, layout, optimizer and sharding, before any of it exists.

Rows have two forms. Logical, as checkpoints, host memory and all who look at one row have them:
[R, S, F]. Stored, as devices hold a table: [S, R, F], each vector of all rows together. TPUs lay
out the two minor dimensions of an array in tiles of 8 x 128, so S vectors in the middle would be
padded, or copied to another layout and back; and of rows [R, S * F] with more than 20,480 numbers
their compiler copies the whole table to gather from it, and scatters row by row in a loop. Stored,
the rows of a batch are gathered and scattered in place whatever S is.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stem_jax.mesh import Placed, check_divides
from stem_jax.tables.layout import TableLayout

# The row optimizer of a run that trains the backbone alone.
FROZEN = "frozen"
# What row optimizers keep of a row.
ADAMW, ROWWISE = "adamw", "rowwise"
# The field of the update that a row had last.
LAST_STEP = "last_step"
# Of a field that a table does not have.
_NONE: Any = None


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a table, of the name that it has in `TableState`.

    dtype: NumPy's name. axes: its logical dimensions, of R rows, S vectors and F columns.
    """

    name: str
    dtype: str
    axes: str = "RSF"


@dataclasses.dataclass(frozen=True)
class TableSpec:
    """A table of rows [V_pad, S, F], stored as [S, V_pad, F].

    Attributes:
        layout: key <-> row.
        vectors: S; of STEM's tables a row holds one for each STEM layer.
        width: F.
        init_std: standard deviation of the initial rows.
        vocab_axes: mesh axes that shard the rows; the columns follow the tensor axis.
        optimizer: name of the row optimizer; `FROZEN` for rows that stay as they are.
        lr_multiplier: rows learn at this multiple of the backbone's rate.
        weight_decay, beta1, beta2, epsilon, clip_norm: AdamW of the rows.
        capacity: rows per pair of devices and round of the exchange; None chooses.
        resident_rows: rows that the devices hold together; None for all.
        host_rows: rows that host memory holds of those, over all shards; None for all.
        disk: folder that has the others, of each process's machine.
        row_format: dtype of the rows, and of AdamW's moments: float32, or bfloat16, to which
            updates are rounded at random (`rounding`).
        moments: `ADAMW`, mu and nu for every number; `ROWWISE`, a v for every vector.
        rounding_seed: of that rounding.
        trained_keys: whose rows alone are updated; None for all.
        section: of the configuration, which has its `resident_rows`; for messages, as what follows.
        size_keys: keys that make it as large as it is.
        width_rule: what F is, in keys.
    """

    layout: TableLayout
    vectors: int
    width: int
    init_std: float
    vocab_axes: tuple[str, ...]
    optimizer: str
    lr_multiplier: float
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    clip_norm: float
    capacity: int | None
    resident_rows: int | None = None
    host_rows: int | None = None
    disk: str | None = None
    row_format: str = "float32"
    moments: str = ADAMW
    rounding_seed: int = 0
    trained_keys: tuple[int, ...] | None = None
    section: str = "tables"
    size_keys: tuple[str, ...] = ("model.ffn_dim", "model.stem_layers", "model.vocab_size")
    width_rule: str = "model.ffn_dim"

    @property
    def resident_key(self) -> str:
        """The key that says how many rows the devices hold."""
        return f"{self.section}.resident_rows"

    @property
    def num_rows(self) -> int:
        """V_pad."""
        return self.layout.num_rows

    @property
    def offloaded(self) -> bool:
        """Whether some rows are in host memory."""
        return self.resident_rows is not None

    @property
    def made_when_asked(self) -> bool:
        """Whether the host keeps the rows alone that were written: most hashed keys never come."""
        return self.layout.spread or self.on_disk

    @property
    def on_disk(self) -> bool:
        """Whether some rows are on disk."""
        return self.offloaded and self.host_rows is not None

    @property
    def num_slots(self) -> int:
        """R: rows that all devices together have room for; V_pad unless some are offloaded."""
        return self.num_rows if self.resident_rows is None else self.resident_rows

    @property
    def num_parameters(self) -> int:
        """Trained numbers, padding rows not counted."""
        return self.layout.num_keys * self.vectors * self.width

    @property
    def row_size(self) -> int:
        """Numbers of a row: S * F."""
        return self.vectors * self.width

    @property
    def fields(self) -> tuple[Field, ...]:
        """The rows, and what their optimizer keeps of each; of rows that stay, nothing."""
        rows = Field("rows", self.row_format)
        if self.optimizer == FROZEN:
            return (rows,)
        last_step = Field(LAST_STEP, "int32", "R")
        if self.moments == ROWWISE:
            return rows, Field("v", "float32", "RS"), last_step
        return rows, Field("mu", self.row_format), Field("nu", self.row_format), last_step

    @property
    def moved_fields(self) -> tuple[Field, ...]:
        """Those that an update computes."""
        return tuple(field for field in self.fields if "S" in field.axes)

    def field(self, name: str) -> Field:
        """The field of a name."""
        return next(field for field in self.fields if field.name == name)

    def shape(self, name: str, rows: int | None = None, columns: int | None = None):
        """Logical shape of a field; of the whole table unless told how many rows and columns."""
        rows = self.num_rows if rows is None else rows
        columns = self.width if columns is None else columns
        sizes = {"R": rows, "S": self.vectors, "F": columns}
        return tuple(sizes[axis] for axis in self.field(name).axes)

    def row_bytes(self, *names: str) -> int:
        """Bytes of a row in these fields; in all of them if none is named."""
        names = names or tuple(field.name for field in self.fields)
        return sum(
            math.prod(self.shape(name, 1)) * np.dtype(self.field(name).dtype).itemsize
            for name in names
        )

    def partition(self, name: str) -> PartitionSpec:
        """Partition of a field, stored; every device has the same numbers of its logical form."""
        return PartitionSpec(*stored_shape(tuple(self.logical_partition(name))))

    def logical_partition(self, name: str) -> PartitionSpec:
        """Partition of a field, logical."""
        parts = {"R": self.vocab_axes or None, "S": None, "F": "tensor"}
        return PartitionSpec(*(parts[axis] for axis in self.field(name).axes))

    @property
    def row_spec(self) -> PartitionSpec:
        """Partition of stored rows [S, R, F]."""
        return PartitionSpec(None, self.vocab_axes or None, "tensor")

    @property
    def logical_spec(self) -> PartitionSpec:
        """Partition of logical rows [R, S, F]; every device has the same numbers."""
        return PartitionSpec(self.vocab_axes or None, None, "tensor")

    @property
    def index_spec(self) -> PartitionSpec:
        """Partition of [V_pad], as of [R]."""
        return PartitionSpec(self.vocab_axes or None)

    def placed(self) -> list[Placed]:
        """The arrays on the devices, for the placement check and the start-up report."""
        multiple = self.resident_key if self.offloaded else "tables.pad_multiple"
        remedy = (
            f"make {multiple} a multiple of the row shards and {self.width_rule} of "
            "mesh.tensor, or change tables.vocab_axes or the mesh"
        )
        prefix = "table" if self.section == "tables" else self.section
        return [
            Placed(
                f"{prefix}_{field.name}",
                self.shape(field.name, self.num_slots),
                np.dtype(field.dtype).itemsize,
                self.logical_partition(field.name),
                remedy,
            )
            for field in self.fields
        ]


def check_host_rows(specs: Iterable[TableSpec], mesh: Mesh) -> None:
    """Checks what lies in host memory, as `check_placement` does what lies on devices.

    Raises:
        InputError: rows that do not divide over the shards.
    """
    for spec in specs:
        if spec.offloaded:
            what = f"{spec.resident_key} keeps all rows in host memory, whose number"
            remedy = (
                "make tables.pad_multiple a multiple of the row shards, or change "
                "tables.vocab_axes or the mesh"
            )
            check_divides(spec.num_rows, what, spec.vocab_axes, mesh, remedy)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TableState:
    """The rows on the devices, with what their optimizer keeps; see `TableSpec.fields`.

    rows, mu, nu: [S, R, F], stored. v: [S, R] float32, likewise. last_step: [R] int32, the last
    update whose batch asked for the row, from 1; 0 is never. With all rows resident R is V_pad and
    a row lies at its own number. What a table does not have is None, and not among its `vars`.
    """

    rows: jax.Array = _NONE
    mu: jax.Array = _NONE
    nu: jax.Array = _NONE
    last_step: jax.Array = _NONE
    v: jax.Array = _NONE

    def __post_init__(self):
        for name in [name for name, array in vars(self).items() if array is None]:
            object.__delattr__(self, name)


def stored(field):
    """Rows [R, S, F], of NumPy or JAX, in the form in which devices hold a table: [S, R, F].

    Fields of a number for each vector, [R, S], likewise; of one for a row, [R], there is one form.
    """
    return field.swapaxes(0, 1) if field.ndim > 1 else field


def stored_shape(shape: tuple) -> tuple:
    """The shape, or partition, of `stored` of an array of this logical shape, or partition."""
    return (shape[1], shape[0], *shape[2:]) if len(shape) > 1 else shape


def logical(field):
    """The inverse of `stored`: [R, S, F], or [R]."""
    return field.swapaxes(0, 1) if field.ndim > 1 else field


def initial_rows(spec: TableSpec, key: jax.Array, rows: jax.Array) -> jax.Array:
    """Normal rows [len(rows), S, F] of std `init_std`; a row depends on its number alone.

    In the table's format, each number the nearest.
    """

    def one_row(row):
        shape = (spec.vectors, spec.width)
        return jax.random.normal(jax.random.fold_in(key, row), shape, jnp.float32)

    return (jax.vmap(one_row)(rows) * spec.init_std).astype(spec.row_format)


def init_table(
    spec: TableSpec, key: jax.Array, mesh: Mesh, rows: jax.Array | None = None
) -> TableState:
    """Creates a table in place, shard by shard, under jit with the table's shardings.

    Args:
        rows: stored, [S, V_pad, F], to begin with, in their place; donated. None: random ones.
    """

    def create(rows) -> TableState:
        if rows is None:
            rows = stored(initial_rows(spec, key, jnp.arange(spec.num_rows)))
        shapes = dict(vars(abstract_table(spec)))
        shapes.pop("rows")
        zeros = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
        return TableState(rows=rows, **zeros)

    return jax.jit(create, donate_argnums=0, out_shardings=table_shardings(spec, mesh))(rows)


def abstract_table(spec: TableSpec) -> TableState:
    """Shapes and dtypes of what is on the devices."""
    shapes: dict[str, Any] = {
        field.name: jax.ShapeDtypeStruct(
            stored_shape(spec.shape(field.name, spec.num_slots)), field.dtype
        )
        for field in spec.fields
    }
    return TableState(**shapes)


def table_shardings(spec: TableSpec, mesh: Mesh) -> TableState:
    """A TableState of shardings."""
    shardings: dict[str, Any] = {
        field.name: NamedSharding(mesh, spec.partition(field.name)) for field in spec.fields
    }
    return TableState(**shardings)
