"""What a reader is: a module that takes rows of a memory into the residual stream, at a site.

A reader is an nnx.Module in `readers.READERS`. It is made as `Reader.of(config, memory, mesh,
rngs=rngs)` and called as

    y, state = reader(x_BxLxD, embedded_BxLxD, rows_BxLxKxF, segment_ids_BxL, state)

Beside that stand two class methods of a configuration and a memory: `weights_of`, the shapes of its
parameters by their names within the reader, and `cost_of`.
"""

from typing import Any, ClassVar

import jax
from flax import nnx
from jax.sharding import Mesh

from stem_jax.config import Config
from stem_jax.memory.memory import Memory
from stem_jax.model.kind import LayerCost

# After the token embedding, before the first layer.
INPUT = "input"
BEFORE_ATTENTION = "before_attention"
# Of attention, before its cache takes them.
VALUES = "values"
AFTER_FEED_FORWARD = "after_feed_forward"
SITES = (INPUT, BEFORE_ATTENTION, VALUES, AFTER_FEED_FORWARD)


class Reader(nnx.Module):
    """See above; the base of all readers.

    site: one of SITES. silent: parameters with which at zero it leaves the model as it is; where it
    is put into a trained model they begin so. None: there are no such.
    """

    site: ClassVar[str]
    silent: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of(cls, config: Config, memory: Memory, mesh: Mesh | None, *, rngs: nnx.Rngs) -> "Reader":
        """One of a model, for the rows of a memory."""
        raise NotImplementedError

    @classmethod
    def weights_of(cls, config: Config, memory: Memory) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters, by name within the reader."""
        raise NotImplementedError

    @classmethod
    def cost_of(cls, config: Config, memory: Memory) -> LayerCost:
        """What one layer's costs."""
        raise NotImplementedError

    def __call__(
        self,
        x_BxLxD: jax.Array,
        embedded_BxLxD: jax.Array,
        rows_BxLxKxF: jax.Array,
        segment_ids_BxL: jax.Array,
        state: Any,
    ) -> tuple[jax.Array, Any]:
        """The residual stream with the rows in it.

        At the site `values`, x is what attention reads, and what comes back is added to its values:
        [B, L, KV heads, Dh].

        Args:
            embedded_BxLxD: the token embeddings.
            rows_BxLxKxF: of the K keys that a layer reads of a token, one vector each.
            segment_ids_BxL: document of each position; 0 is padding.
            state: what it gave for the tokens before, of the same sequences; None where they begin.
                Its leading axis is the batch. Of a sequence that ends in padding it is that after
                its last token. A reader of a token's own rows alone has None.
        """
        raise NotImplementedError
