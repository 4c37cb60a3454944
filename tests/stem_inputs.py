"""The decoder's inputs of tests that choose where a token's row is."""

from stem_jax.memory.memory import STEM
from stem_jax.model.inputs import Inputs, RowIndex


def stem_inputs(tokens, inverse, positions, segment_ids, dropped=None) -> Inputs:
    """Those of a model with STEM's memory; all arrays [B, L]. inverse: see `RowIndex`."""
    return Inputs(tokens, positions, segment_ids, {STEM: RowIndex(inverse)}, dropped)
