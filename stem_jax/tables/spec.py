"""What a table is: size, layout, optimizer and sharding, before any of it exists.

Rows have two forms. Logical, as checkpoints, host memory and all who look at one row have them:
[R, S, F]. Stored, as devices hold a table: [S, R, F], each vector of all rows together. TPUs lay
out the two minor dimensions of an array in tiles of 8 x 128, so S vectors in the middle would be
padded, or copied to another layout and back; and of rows [R, S * F] with more than 20,480 numbers
their compiler copies the whole table to gather from it, and scatters row by row in a loop. Stored,
the rows of a batch are gathered and scattered in place whatever S is.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stem_jax.config import Config
from stem_jax.mesh import Placed
from stem_jax.tables.layout import TableLayout


@dataclasses.dataclass(frozen=True)
class TableSpec:
    """All STEM layers' tables as one table of rows [V_pad, S, F], stored as [S, V_pad, F].

    Attributes:
        layout: key <-> row.
        num_layers: S; a row holds one vector for each STEM layer.
        width: F.
        init_std: standard deviation of the initial rows.
        vocab_axes: mesh axes that shard the rows; the columns follow the tensor axis.
        optimizer: name of the row optimizer.
        lr_multiplier: rows learn at this multiple of the backbone's rate.
        weight_decay, beta1, beta2, epsilon, clip_norm: AdamW of the rows.
        capacity: rows per pair of devices and round of the exchange; None chooses.
        resident_rows: rows that the devices hold together; None for all.
        row_format: dtype of the rows.
    """

    layout: TableLayout
    num_layers: int
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
    row_format: str = "float32"

    @classmethod
    def from_config(cls, config: Config) -> "TableSpec":
        """The table of a run; S is 0 for a dense model."""
        layout = TableLayout(config.model.vocab_size, config.tables.pad_multiple)
        resident, S = config.tables.resident_rows, config.model.num_stem_layers
        return cls(
            layout=layout,
            num_layers=S,
            width=config.model.ffn_dim,
            row_format=config.tables.row_format,
            init_std=config.table_init_std,
            vocab_axes=config.tables.vocab_axes,
            optimizer=config.tables.optimizer,
            lr_multiplier=config.tables.lr_multiplier,
            weight_decay=config.table_weight_decay,
            beta1=config.optimizer.beta1,
            beta2=config.optimizer.beta2,
            epsilon=config.optimizer.epsilon,
            clip_norm=config.tables.clip_norm,
            capacity=config.tables.capacity,
            resident_rows=resident if resident and S and resident < layout.num_rows else None,
        )

    @property
    def num_rows(self) -> int:
        """V_pad."""
        return self.layout.num_rows

    @property
    def offloaded(self) -> bool:
        """Whether some rows are in host memory."""
        return self.resident_rows is not None

    @property
    def num_slots(self) -> int:
        """R: rows that all devices together have room for; V_pad unless some are offloaded."""
        return self.num_rows if self.resident_rows is None else self.resident_rows

    @property
    def num_parameters(self) -> int:
        """Trained numbers, padding rows not counted."""
        return self.layout.num_keys * self.num_layers * self.width

    @property
    def row_size(self) -> int:
        """Numbers of a row: S * F."""
        return self.num_layers * self.width

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
        shape = (self.num_slots, self.num_layers, self.width)
        multiple = "tables.resident_rows" if self.offloaded else "tables.pad_multiple"
        remedy = (
            f"make {multiple} a multiple of the row shards and model.ffn_dim of "
            "mesh.tensor, or change tables.vocab_axes or the mesh"
        )
        return [
            *(
                Placed(f"table_{name}", shape, 4, self.logical_spec, remedy)
                for name in ("rows", "mu", "nu")
            ),
            Placed("table_last_step", shape[:1], 4, self.index_spec, remedy),
        ]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TableState:
    """The rows on the devices, with their slot variables.

    rows, mu, nu: [S, R, F] float32, stored. last_step: [R] int32, the last update whose batch
    asked for the row, from 1; 0 is never. With all rows resident R is V_pad and a row lies at its
    own number.
    """

    rows: jax.Array
    mu: jax.Array
    nu: jax.Array
    last_step: jax.Array


def stored(field):
    """Rows [R, S, F], of NumPy or JAX, in the form in which devices hold a table: [S, R, F].

    Fields of one number for a row, [R], have one form.
    """
    return field.swapaxes(0, 1) if field.ndim > 1 else field


def logical(field):
    """The inverse of `stored`: [R, S, F], or [R]."""
    return field.swapaxes(0, 1) if field.ndim > 1 else field


def initial_rows(spec: TableSpec, key: jax.Array, rows: jax.Array) -> jax.Array:
    """Normal rows [len(rows), S, F] of std `init_std`; a row depends on its number alone."""

    def one_row(row):
        shape = (spec.num_layers, spec.width)
        return jax.random.normal(jax.random.fold_in(key, row), shape, jnp.float32)

    return jax.vmap(one_row)(rows) * spec.init_std


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
        zeros = jnp.zeros_like(rows)
        return TableState(rows, zeros, zeros, jnp.zeros(spec.num_rows, jnp.int32))

    return jax.jit(create, donate_argnums=0, out_shardings=table_shardings(spec, mesh))(rows)


def table_shardings(spec: TableSpec, mesh: Mesh) -> TableState:
    """A TableState of shardings."""
    rows = NamedSharding(mesh, spec.row_spec)
    return TableState(rows, rows, rows, NamedSharding(mesh, spec.index_spec))
