"""What follows from a configuration and a mesh, built once: the model, the memories, their tables.

Whoever makes, places, describes or saves the arrays of a run takes them from here, and derives no
table and no partition a second time.
"""

import contextlib
import dataclasses
import functools

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stem_jax.config import Config
from stem_jax.memory.catalogue import memories, table_specs
from stem_jax.mesh import BATCH_AXES, CONTEXT, Placed, parameter_spec
from stem_jax.model.draws import Draw, Unnamed, parameter_key
from stem_jax.model.layer_plan import (
    LAYERS,
    by_layer,
    layer_names,
    repeating_groups,
    stack_names,
    stacked,
)
from stem_jax.model.layers import truncated_normal
from stem_jax.model.lora import first_factor, is_of_adapters, trained_by
from stem_jax.model.row_reads import layer_forms
from stem_jax.model.transformer import Transformer
from stem_jax.training.optimizer import make_optimizer

Params = dict[str, jax.Array]


class Blueprint:
    """A configuration on a mesh.

    model: the backbone. memories, specs: of each memory, what it is, and its table.
    batch_sharding: of arrays [A, B, L].
    """

    def __init__(self, config: Config, mesh: Mesh):
        self.config = config
        self.mesh = mesh
        self.model = ModelDef(config, mesh)
        self.memories = memories(config)
        self.specs = table_specs(config)
        self.batch_sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES, CONTEXT))

    def placed(self) -> list[Placed]:
        """Every large array of a run."""
        tables = (array for spec in self.specs.values() for array in spec.placed())
        return [*self.model.placed(), *tables]


class ModelDef:
    """The backbone as a pure function: `bind` puts parameters into a module."""

    def __init__(self, config: Config, mesh: Mesh | None = None):
        def make():
            return Transformer(config, mesh, rngs=nnx.Rngs(params=config.train.seed))

        def make_unnamed():
            return Transformer(config, mesh, rngs=Unnamed())

        self._make = make_unnamed if config.train.init == "name" else make
        self._seed = config.train.seed
        self._param_dtype = config.model.param_dtype
        self.graph, self.abstract = nnx.split(nnx.eval_shape(make))
        self._axes = {
            _name(path): variable.get_metadata()["logical_axes"]
            for path, variable in nnx.to_flat_state(self.abstract)
        }
        self._groups = repeating_groups(layer_forms(config)) if config.model.scan_layers else None
        # What a state calls its parameters.
        self.state_names = stack_names(self._axes, self._groups)
        # Whether steps that train the backbone change a parameter.
        self.trains = trained_by(config)
        self.optimizer = make_optimizer(config.optimizer, self.axes_of, self.trains)

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
            params = {
                _name(path): self._drawn(_name(path), variable.get_value())
                for path, variable in nnx.to_flat_state(state)
            }
        if mesh is None:
            return params
        specs = self.specs()
        return {
            name: _placer(NamedSharding(mesh, specs[name]))(value) for name, value in params.items()
        }

    def init_adapters(self, mesh: Mesh) -> Params:
        """Of the same, the factors of adapters alone, made without the others."""
        specs = self.specs()
        return {
            name: _placer(NamedSharding(mesh, specs[name]))(
                first_factor(name, shape.shape, self._seed)
            )
            for name, shape in self.shapes().items()
            if is_of_adapters(name)
        }

    def _drawn(self, name: str, value: jax.Array | Draw) -> jax.Array:
        """The numbers of a parameter."""
        if not isinstance(value, Draw):
            return value
        return truncated_normal(parameter_key(self._seed, name), *dataclasses.astuple(value))

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
