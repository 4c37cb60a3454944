"""What a memory is: keys, and the vectors that their rows hold.

What is done with rows is a reader's business; where they lie, which optimizer moves them and how
they travel is a table's. Keys are a function of token ids alone, so the rows of a batch can be
brought before its step begins.
"""

from typing import Protocol

# Of the first memory, whose checkpoints and metrics were named before there were others.
STEM = "stem"
# What reads before the first layer is asked for as this one.
INPUT_LAYER = -1
# Stands for a token in `before`, where there was none.
NO_TOKEN = -1


class Memory(Protocol):
    """One token-indexed memory of a model.

    name: prefix of its metrics and checkpoint items. num_keys: of its table. vectors, width: a row
    is [vectors, width]. reach: tokens before its own that a key depends on, 0 for none; decoding
    carries so many. reader: what takes its rows into the model, by its name in
    `model.readers.READERS`; None: the kind of a layer does.
    """

    @property
    def name(self) -> str: ...

    @property
    def num_keys(self) -> int: ...

    @property
    def vectors(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def reach(self) -> int: ...

    @property
    def reader(self) -> str | None: ...

    def keys(self, tokens_BxL, segment_ids_BxL, before_BxR=None):
        """Integer keys [..., L], or [..., L, K] of several for a token.

        Args:
            tokens_BxL: ids, any leading dimensions; of NumPy or JAX.
            segment_ids_BxL: numbers of their documents in a row; 0 is padding.
            before_BxR: the `reach` tokens before them, NO_TOKEN before the first of a text; None
                where a row begins.
        """
        ...

    def reads(self, layer: int) -> tuple[slice, int] | None:
        """Which of a token's K keys, and which vector of their rows, a layer reads; None: none.

        The layer before the first is INPUT_LAYER.
        """
        ...


def prefix(name: str) -> str:
    """What metrics and checkpoint items of a memory begin with."""
    return "table" if name == STEM else name
