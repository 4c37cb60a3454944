"""Everything a step changes, and how it is created and sharded."""

import contextlib
import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stem_jax.config import Config
from stem_jax.memory.catalogue import table_specs
from stem_jax.memory.memory import STEM
from stem_jax.mesh import Placed, parameter_spec, replicated
from stem_jax.model.layer_plan import (
    LAYERS,
    by_layer,
    layer_names,
    repeating_groups,
    stack_and_free,
    stack_names,
    stacked,
)
from stem_jax.model.transformer import Transformer
from stem_jax.tables.spec import TableState, abstract_table, init_table, table_shardings
from stem_jax.training.optimizer import make_optimizer

Params = dict[str, jax.Array]


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


class ModelDef:
    """The backbone as a pure function: `bind` puts parameters into a module."""

    def __init__(self, config: Config, mesh: Mesh | None = None):
        def make():
            return Transformer(config.model, mesh, rngs=nnx.Rngs(params=config.train.seed))

        self._make = make
        self._param_dtype = config.model.param_dtype
        self.graph, self.abstract = nnx.split(nnx.eval_shape(make))
        self._axes = {
            _name(path): variable.get_metadata()["logical_axes"]
            for path, variable in nnx.to_flat_state(self.abstract)
        }
        self._groups = repeating_groups(config.model) if config.model.scan_layers else None
        # What a state calls its parameters.
        self.state_names = stack_names(self._axes, self._groups)
        self.optimizer = make_optimizer(config.optimizer, self.axes_of)

    def copies(self, params: Params) -> Params:
        """The parameters as a step reads them, in `model.param_dtype`.

        A state holds them in float32: in bfloat16 an update smaller than a rounding step is lost.
        """
        return jax.tree.map(lambda p: p.astype(self._param_dtype), params)

    def bind(self, params: Params) -> Transformer:
        """The module with copies of these parameters, by layer or as a state has them."""
        copies = self.copies(params)
        module = nnx.merge(self.graph, _filled(self.abstract, by_layer(copies)))
        if self._groups is not None and copies.keys() == set(self.state_names):
            # Beside the layers taken out of them: those are for who asks for one, and cost nothing.
            blocks = self.abstract["blocks"]
            module.stacks = nnx.data(
                [
                    _filled(blocks[place], copies, self._groups.stack(place))
                    for place in self._groups.places
                ]
            )
        return module

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
        """Partition of each parameter, by layer."""
        return {name: parameter_spec(axes) for name, axes in self._axes.items()}

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each parameter by layer; `jax.eval_shape(copies)` has the others."""
        return {
            _name(path): jax.ShapeDtypeStruct(variable.shape, variable.dtype)
            for path, variable in nnx.to_flat_state(self.abstract)
        }

    def state_specs(self) -> dict[str, PartitionSpec]:
        """Partition of each parameter as a state has it."""
        return {name: parameter_spec(self.axes_of(name)) for name in self.state_names}

    def state_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each parameter as a state has it."""
        return jax.eval_shape(lambda params: stacked(params, self.state_names), self.shapes())

    def axes_of(self, name: str) -> tuple[str, ...]:
        """The logical axes of a parameter, by layer or of a state."""
        layer, *others = layer_names(name)
        return (LAYERS, *self._axes[layer]) if others else self._axes[layer]

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


def _filled(abstract: nnx.State, params: Params, *prefix: str) -> nnx.State:
    """The state of a module, whose parameters have names that begin so."""
    return nnx.from_flat_state(
        [
            (path, variable.replace(params[_name((*prefix, *path))]))
            for path, variable in nnx.to_flat_state(abstract)
        ]
    )


def state_shardings(config: Config, model: ModelDef, mesh: Mesh) -> TrainState:
    """A TrainState of shardings.

    What an optimizer keeps of a parameter in the parameter's own shape lies as it does; all else,
    such as counts, and sums over rows or columns, every device has whole.
    """
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
    specs = table_specs(config)
    tables = {name: table_shardings(spec, mesh) for name, spec in specs.items()}
    return TrainState(whole, whole, whole, dict.fromkeys(specs, whole), params, opt_state, tables)


def init_state(
    config: Config,
    model: ModelDef,
    mesh: Mesh,
    params: Params | None = None,
    rows: dict[str, jax.Array] | None = None,
) -> TrainState:
    """A state at step 0, every array created in its place; without offloaded tables.

    Args:
        params: to begin with, by layer and in their places; donated. None: random ones.
        rows: stored, [S, V_pad, F], likewise.
    """
    shardings = state_shardings(config, model, mesh)
    specs = table_specs(config)

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


def abstract_state(config: Config, model: ModelDef, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, with no memory behind them."""
    shapes: dict[str, Any] = dict(model.state_shapes())
    scalar: Any = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(model.optimizer.init, shapes)
    specs = table_specs(config)
    tables = {name: abstract_table(spec) for name, spec in specs.items()}
    touched = dict.fromkeys(specs, scalar)
    state = TrainState(scalar, scalar, scalar, touched, shapes, opt_state, tables)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        state_shardings(config, model, mesh),
    )
