"""Everything a step changes, and how it is created and sharded."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stem_jax.config import Config
from stem_jax.mesh import Placed, parameter_spec, replicated
from stem_jax.model.transformer import Transformer
from stem_jax.tables.spec import TableSpec, TableState, init_table, table_shardings
from stem_jax.training.optimizer import make_optimizer

Params = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run.

    step: scalar int32, global batches consumed. updates: scalar int32, completed optimizer updates;
    lower than `step` by the batches skipped for non-finite values. bad_steps: scalar int32, skipped
    batches in a row. touched_rows: scalar int32, rows that some update had. params: backbone by
    dotted name. opt_state: optax state; both float32, whatever dtype a step computes in. table:
    None for a dense model.
    """

    step: jax.Array
    updates: jax.Array
    bad_steps: jax.Array
    touched_rows: jax.Array
    params: Params
    opt_state: Any
    table: TableState | None


class ModelDef:
    """The backbone as a pure function: `bind` puts parameters into a module."""

    def __init__(self, config: Config, mesh: Mesh | None = None):
        def make():
            return Transformer(config.model, mesh, rngs=nnx.Rngs(params=config.train.seed))

        self._make = make
        self._param_dtype = config.model.param_dtype
        self.graph, self.abstract = nnx.split(nnx.eval_shape(make))
        self._paths = [path for path, _ in nnx.to_flat_state(self.abstract)]

    def copies(self, params: Params) -> Params:
        """The parameters as a step reads them, in `model.param_dtype`.

        A state holds them in float32: in bfloat16 an update smaller than a rounding step is lost.
        """
        return jax.tree.map(lambda p: p.astype(self._param_dtype), params)

    def bind(self, params: Params) -> Transformer:
        """The module with copies of these parameters."""
        copies = self.copies(params)
        flat = {path: copies[_name(path)] for path in self._paths}
        state = nnx.from_flat_state(
            [
                (path, variable.replace(flat[path]))
                for path, variable in nnx.to_flat_state(self.abstract)
            ]
        )
        return nnx.merge(self.graph, state)

    def init(self, mesh: Mesh | None = None) -> Params:
        """Fresh parameters in float32, from the configured seed, created in their places.

        Args:
            mesh: with the places; None: the first device is.
        """
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            _, state = nnx.split(self._make())
        params = {_name(path): variable[...] for path, variable in nnx.to_flat_state(state)}
        if mesh is None:
            return params
        specs = self.specs()
        return {
            name: _placer(NamedSharding(mesh, specs[name]))(value) for name, value in params.items()
        }

    def specs(self) -> dict[str, PartitionSpec]:
        """Partition of each parameter."""
        return {
            _name(path): parameter_spec(variable.get_metadata()["logical_axes"])
            for path, variable in nnx.to_flat_state(self.abstract)
        }

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each parameter of a state; `jax.eval_shape(copies)` has the others."""
        return {
            _name(path): jax.ShapeDtypeStruct(variable.shape, variable.dtype)
            for path, variable in nnx.to_flat_state(self.abstract)
        }

    def placed(self) -> list[Placed]:
        """The parameters, for the placement check and the start-up report."""
        specs = self.specs()
        return [
            Placed(name, shape.shape, shape.dtype.itemsize, specs[name])
            for name, shape in self.shapes().items()
        ]


@functools.cache
def _placer(place: NamedSharding):
    """A program, in which every process has the array: `device_put` would compare theirs."""
    return jax.jit(lambda x: x, out_shardings=place)


def _name(path: tuple) -> str:
    return ".".join(str(part) for part in path)


def state_shardings(config: Config, model: ModelDef, mesh: Mesh) -> TrainState:
    """A TrainState of shardings; slot variables lie where their parameters lie."""
    whole = replicated(mesh)
    params = {name: NamedSharding(mesh, spec) for name, spec in model.specs().items()}
    abstract = jax.eval_shape(make_optimizer(config.optimizer).init, model.shapes())
    opt_state = jax.tree.map(
        lambda part: params if isinstance(part, dict) else whole,
        abstract,
        is_leaf=lambda part: isinstance(part, dict),
    )
    spec = TableSpec.from_config(config)
    table = table_shardings(spec, mesh) if spec.num_layers else None
    return TrainState(whole, whole, whole, whole, params, opt_state, table)


def init_state(
    config: Config,
    model: ModelDef,
    mesh: Mesh,
    params: Params | None = None,
    rows: jax.Array | None = None,
) -> TrainState:
    """A state at step 0, every array created in its place; without an offloaded table.

    Args:
        params: to begin with, in their places; donated. None: random ones.
        rows: stored, [S, V_pad, F], likewise.
    """
    shardings = state_shardings(config, model, mesh)
    optimizer = make_optimizer(config.optimizer)

    def backbone(params):
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, zero, zero, zero, params, optimizer.init(params), None)

    make = jax.jit(
        backbone, donate_argnums=0, out_shardings=dataclasses.replace(shardings, table=None)
    )
    state = make(model.init(mesh) if params is None else params)
    spec = TableSpec.from_config(config)
    if spec.num_layers and not spec.offloaded:
        table = init_table(spec, table_key(config), mesh, rows)
        state = dataclasses.replace(state, table=table)
    return state


def table_key(config: Config) -> jax.Array:
    """The random key of the table's first rows."""
    return jax.random.fold_in(jax.random.key(config.train.seed), 1)


def dropout_key(config: Config) -> jax.Array:
    """The random key of what training drops."""
    return jax.random.fold_in(jax.random.key(config.train.seed), 2)


def abstract_state(config: Config, model: ModelDef, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, with no memory behind them."""
    shapes = model.shapes()
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(make_optimizer(config.optimizer).init, shapes)
    table = None
    spec = TableSpec.from_config(config)
    if spec.num_layers:
        size = (spec.num_layers, spec.num_slots, spec.width)
        rows = jax.ShapeDtypeStruct(size, jnp.float32)
        last_step = jax.ShapeDtypeStruct((spec.num_slots,), jnp.int32)
        table = TableState(rows, rows, rows, last_step)
    state = TrainState(scalar, scalar, scalar, scalar, shapes, opt_state, table)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        state_shardings(config, model, mesh),
    )
