"""Memories beside STEM's in an export for transformers: names of their weights, and their code.

    ours                                           transformers, linear weights [out, in]
    blocks.0.readers.value.gate_proj.kernel        model.layers.0.self_attn.value_gate.weight
    the rows of value                              model.layers.0.self_attn.value_table.weight
    blocks.0.readers.per_layer.gate_proj.kernel    model.layers.0.per_layer.gate_proj.weight
    blocks.0.readers.per_layer.out_norm.scale      model.layers.0.per_layer.out_norm.weight
    the rows of per_layer                          model.layers.0.per_layer.table.weight

What a model has is said as in config.json, `{"value": {"layers": [0]}, "per_layer": {"layers": [0],
"width": 32}}`; the keys are those of the sections of the configuration.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from stem_jax.config import Config, ModelConfig
from stem_jax.errors import InputError
from stem_jax.interop.llama_names import Weight
from stem_jax.json_fields import Fields
from stem_jax.memory.per_layer import PER_LAYER
from stem_jax.memory.value import VALUE
from stem_jax.model.per_layer_reader import PerLayerReader
from stem_jax.model.value_reader import ValueReader

# Of each memory, the keys of its section that say what it is.
KEYS = {VALUE: ("layers",), PER_LAYER: ("layers", "width")}
Memories = Mapping[str, Mapping[str, Any]]


class Code(NamedTuple):
    """The code of a model with some memories.

    files: beside those of all models. name: that of the first, which has the classes. kind: what
    their names have behind Stem.
    """

    files: tuple[str, ...]
    kind: str

    @property
    def name(self) -> str:
        return self.files[0].removesuffix(".py")


CODES = {
    (): Code(("modeling_stem.py",), ""),
    (VALUE,): Code(("modeling_stem_value.py", "modeling_stem.py"), "Value"),
    (PER_LAYER,): Code(("modeling_stem_per_layer.py", "modeling_stem.py"), "PerLayer"),
    (VALUE, PER_LAYER): Code(
        (
            "modeling_stem_value_per_layer.py",
            "modeling_stem_value.py",
            "modeling_stem_per_layer.py",
            "modeling_stem.py",
        ),
        "ValuePerLayer",
    ),
}


def memories_of(config: Config) -> dict[str, dict[str, Any]]:
    """What a configuration has of those that an export can have, as config.json says it."""
    found = {}
    for name, keys in KEYS.items():
        values = {key: config.value_of(f"{name}.{key}") for key in keys}
        if values["layers"]:
            found[name] = values | {"layers": list(values["layers"])}
    return found


def read_memories(config: Fields, num_layers: int) -> dict[str, dict[str, Any]]:
    """What config.json says, as values of the sections.

    Raises:
        InputError: an unknown memory or key, or layers that the model has not.
    """
    said = config.inner("memories", {})
    found: dict[str, dict[str, Any]] = {}
    for name in said.values:
        own = said.inner(name)
        if name not in KEYS or {*own.values} != {*KEYS[name]}:
            raise InputError(
                f"config.json: memories has {name} with {', '.join(own.values) or 'nothing'}; only "
                + " and ".join(f"{known} with {', '.join(keys)}" for known, keys in KEYS.items())
                + " can be imported"
            )
        layers = own.integers("layers", most=num_layers - 1)
        if not layers or list(layers) != sorted({*layers}):
            raise InputError(
                f"config.json: memories: {name}: layers is {list(layers)}, expected rising numbers "
                "of layers; give the file that belongs to the model"
            )
        found[name] = {"layers": layers}
        if "width" in KEYS[name]:
            found[name]["width"] = own.integer("width", least=1)
    return {name: found[name] for name in KEYS if name in found}


def memory_weights(model: ModelConfig, memories: Memories) -> Iterator[Weight]:
    """Every parameter of their readers."""
    for name, values in memories.items():
        for layer in values["layers"]:
            if name == VALUE:
                shapes = ValueReader.weights(num_kv_heads=model.num_kv_heads)
                their = {"gate_proj.kernel": f"model.layers.{layer}.self_attn.value_gate.weight"}
            else:
                shapes = PerLayerReader.weights(embed_dim=model.embed_dim, width=values["width"])
                their = {
                    own: f"model.layers.{layer}.per_layer.{own.rpartition('.')[0]}.weight"
                    for own in shapes
                }
            for own, shape in shapes.items():
                ours = f"blocks.{layer}.readers.{name}.{own}"
                yield Weight(ours, their[own], shape[::-1], own.endswith(".kernel"))


def memory_tables(model: ModelConfig, memories: Memories) -> dict[str, dict[str, tuple[int, int]]]:
    """Of each memory the tables with their shapes, in the order of its layers."""
    widths = {VALUE: model.num_kv_heads * model.head_dim}
    places = {VALUE: "self_attn.value_table", PER_LAYER: "per_layer.table"}
    return {
        name: {
            f"model.layers.{layer}.{places[name]}.weight": (
                model.vocab_size,
                values.get("width", widths.get(name)),
            )
            for layer in values["layers"]
        }
        for name, values in memories.items()
    }


def memory_shapes(model: ModelConfig, memories: Memories) -> dict[str, tuple[int, ...]]:
    """Every tensor of them, with its shape."""
    shapes: dict[str, tuple[int, ...]] = {
        weight.theirs: weight.shape for weight in memory_weights(model, memories)
    }
    for tables in memory_tables(model, memories).values():
        shapes |= tables
    return shapes
