"""The tokens before each position of a text, as far as its document and its n-grams go back."""

from typing import Any

import numpy as np

from stem_jax.memory.memory import NO_TOKEN


def preceding(tokens, segment_ids, before, reach: int, eos_id, xp: Any = np) -> list:
    """What n-grams read at each position: its token, the one before, ..., `reach` places before.

    Args:
        tokens: [..., L].
        segment_ids: [..., L], numbers of their documents.
        before: [..., reach], the tokens before them, of the first one's document, eos or NO_TOKEN
            where there are none; None where a row begins.
        xp: numpy or jax.numpy.

    Returns:
        reach + 1 arrays [..., L]; eos_id from the first eos, or end of a document, backwards.
    """
    length = tokens.shape[-1]
    if before is None:
        before = xp.full((*tokens.shape[:-1], reach), eos_id, tokens.dtype)
    before = xp.where(before == NO_TOKEN, eos_id, before)
    tokens = xp.concatenate([before.astype(tokens.dtype), tokens], -1)
    first = xp.repeat(segment_ids[..., :1], reach, -1)
    segments = xp.concatenate([first, segment_ids], -1)
    found = [tokens[..., reach:]]
    for shift in range(1, reach + 1):
        there = slice(reach - shift, reach - shift + length)
        ended = segments[..., there] != segment_ids
        # Its own token may be eos: that ends what comes after it.
        if shift > 1:
            ended = ended | (found[-1] == eos_id)
        found.append(xp.where(ended, eos_id, tokens[..., there]))
    return found
