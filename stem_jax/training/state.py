"""Everything a step changes, and how it is created and sharded."""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from stem_jax.config import Config
from stem_jax.memory.memory import STEM
from stem_jax.mesh import replicated
from stem_jax.model.layer_plan import stack_and_free, stacked
from stem_jax.tables.spec import TableState, abstract_table, init_table, table_shardings
from stem_jax.training.blueprint import Blueprint, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run.

    step: scalar int32, global batches consumed. updates: scalar int32, completed optimizer updates;
    lower than `step` by the batches skipped for non-finite values. bad_steps: scalar int32, skipped
    batches in a row. touched_rows: of each memory, scalar int32, rows that some update had. params:
    backbone by dotted name, stacked where layers are scanned (`model.layer_plan`). opt_state: optax
    state, likewise; both float32, whatever dtype a step computes in. tables: of each memory.
    """

    step: jax.Array
    updates: jax.Array
    bad_steps: jax.Array
    touched_rows: dict[str, jax.Array]
    params: Params
    opt_state: Any
    tables: dict[str, TableState]


def state_shardings(blueprint: Blueprint) -> TrainState:
    """A TrainState of shardings.

    What an optimizer keeps of a parameter in the parameter's own shape lies as it does; all else,
    such as counts, and sums over rows or columns, every device has whole.
    """
    model, mesh, specs = blueprint.model, blueprint.mesh, blueprint.specs
    # A state with shardings for arrays.
    whole: Any = replicated(mesh)
    params: dict[str, Any] = {
        name: NamedSharding(mesh, spec) for name, spec in model.state_specs().items()
    }
    shapes = model.state_shapes()

    def place(path, kept: jax.ShapeDtypeStruct) -> NamedSharding:
        # Not by optax.tree_map_params: optimizers that choose parameters by name cannot begin with
        # the placeholder that it gives them in place of parameters.
        names = [key for step in path if (key := getattr(step, "key", None)) in params]
        same_shape = bool(names) and kept.shape == shapes[names[-1]].shape
        return params[names[-1]] if same_shape else whole

    abstract = jax.eval_shape(model.optimizer.init, shapes)
    opt_state = jax.tree_util.tree_map_with_path(place, abstract)
    tables = {name: table_shardings(spec, mesh) for name, spec in specs.items()}
    return TrainState(whole, whole, whole, dict.fromkeys(specs, whole), params, opt_state, tables)


def init_state(
    blueprint: Blueprint,
    params: Params | None = None,
    rows: dict[str, jax.Array] | None = None,
) -> TrainState:
    """A state at step 0, every array created in its place; without offloaded tables.

    Args:
        params: to begin with, by layer and in their places; donated. None: random ones.
        rows: stored, [S, V_pad, F], likewise.
    """
    config, mesh = blueprint.config, blueprint.mesh
    model, specs = blueprint.model, blueprint.specs
    shardings = state_shardings(blueprint)

    def backbone(params):
        zero = jnp.zeros((), jnp.int32)
        touched = dict.fromkeys(specs, zero)
        return TrainState(zero, zero, zero, touched, params, model.optimizer.init(params), {})

    make = jax.jit(
        backbone, donate_argnums=0, out_shardings=dataclasses.replace(shardings, tables={})
    )
    params = model.init(mesh) if params is None else params
    state = make(stacked(params, model.state_names, stack_and_free))
    tables = {
        name: init_table(spec, table_key(config, name), mesh, (rows or {}).get(name))
        for name, spec in specs.items()
        if not spec.offloaded
    }
    return dataclasses.replace(state, tables=tables)


def table_key(config: Config, name: str = STEM) -> jax.Array:
    """The random key of the first rows of a memory's table."""
    key = jax.random.fold_in(jax.random.key(config.train.seed), 1)
    # A memory has the same rows whatever others there are.
    return key if name == STEM else jax.random.fold_in(key, zlib.crc32(name.encode()))


def dropout_key(config: Config) -> jax.Array:
    """The random key of what training drops."""
    return jax.random.fold_in(jax.random.key(config.train.seed), 2)


def abstract_state(blueprint: Blueprint) -> TrainState:
    """Shapes, dtypes and shardings of the state, with no memory behind them."""
    model, specs = blueprint.model, blueprint.specs
    shapes: dict[str, Any] = dict(model.state_shapes())
    scalar: Any = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(model.optimizer.init, shapes)
    tables = {name: abstract_table(spec) for name, spec in specs.items()}
    touched = dict.fromkeys(specs, scalar)
    state = TrainState(scalar, scalar, scalar, touched, shapes, opt_state, tables)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        state_shardings(blueprint),
    )
