"""Which rows each layer reads: of which memory, by which of a token's keys, which vector of them.

Mostly each vector of a memory's rows is one layer's, read by all of a token's keys. Then the layer
looks it up itself, and rematerialisation looks it up again. Where layers share a vector, or read it
before the first layer, it is looked up ahead of all of them and each takes the keys that are its.
"""

import dataclasses
from collections.abc import Hashable, Mapping

from stem_jax.config import Config
from stem_jax.memory.catalogue import memories
from stem_jax.memory.memory import INPUT_LAYER, Memory
from stem_jax.model.layer_plan import layer_kinds


@dataclasses.dataclass(frozen=True)
class RowRead:
    """One layer's reading of one memory.

    first, count: which of a token's keys. vector: of their rows. reader: in `readers.READERS`;
    None: the layer's kind reads it.
    """

    memory: str
    first: int
    count: int
    vector: int
    reader: str | None

    @property
    def form(self) -> Hashable:
        """What layers have in common that can be one program."""
        return self.memory, self.count, self.reader


class RowReads:
    """The readings of a model's layers."""

    def __init__(self, memories: Mapping[str, Memory], num_layers: int):
        self.memories = memories
        self._of = {
            layer: _reads_of(memories, layer) for layer in (INPUT_LAYER, *range(num_layers))
        }
        self.vectors = {
            name: sorted({read.vector for read in self._all(name)}) for name in memories
        }
        # Looked up ahead of the layers.
        self.ahead = [name for name in memories if self._is_shared(name)]

    def of(self, layer: int) -> tuple[RowRead, ...]:
        """Those of a layer; of INPUT_LAYER those before the first."""
        return self._of[layer]

    def reads_every_vector(self, name: str) -> bool:
        """Whether all vectors of a memory's rows are read."""
        return len(self.vectors[name]) == self.memories[name].vectors

    def keys_of_a_token(self, name: str) -> int:
        """K of a memory."""
        return max((read.first + read.count for read in self._all(name)), default=0)

    def _all(self, name: str) -> list[RowRead]:
        return [read for reads in self._of.values() for read in reads if read.memory == name]

    def _is_shared(self, name: str) -> bool:
        reads = self._all(name)
        return (
            len(reads) > len(self.vectors[name])
            or len({read.count for read in reads}) > 1
            or any(read.first for read in reads)
            or any(read.memory == name for read in self._of[INPUT_LAYER])
        )


def _reads_of(memories: Mapping[str, Memory], layer: int) -> tuple[RowRead, ...]:
    found = []
    for name, memory in memories.items():
        if (reads := memory.reads(layer)) is not None:
            keys, vector = reads
            found.append(RowRead(name, keys.start, keys.stop - keys.start, vector, memory.reader))
    return tuple(found)


def row_reads(config: Config) -> RowReads:
    """Those of a configuration."""
    return RowReads(memories(config), config.model.num_layers)


def layer_forms(config: Config) -> tuple[Hashable, ...]:
    """Of each layer, what it has in common with those that can be one program."""
    reads = row_reads(config)
    return tuple(
        (kind, *(read.form for read in reads.of(layer)))
        for layer, kind in enumerate(layer_kinds(config.model))
    )
