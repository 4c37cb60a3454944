"""The readers that there are; see `reader` for what one is.

A new one is a file with its module and an entry here; a memory names it (`memory.Memory.reader`).
"""

from stem_jax.memory.ngram import EMBEDDING, ENGRAM
from stem_jax.memory.per_layer import PER_LAYER
from stem_jax.memory.value import VALUE
from stem_jax.model.engram import Engram
from stem_jax.model.ngram_embedding import NGramEmbedding
from stem_jax.model.per_layer_reader import PerLayerReader
from stem_jax.model.reader import Reader
from stem_jax.model.value_reader import ValueReader

READERS: dict[str, type[Reader]] = {
    VALUE: ValueReader,
    PER_LAYER: PerLayerReader,
    ENGRAM: Engram,
    EMBEDDING: NGramEmbedding,
}
