"""Sizes that prompts and caches are padded to, so that few programs are compiled."""

from collections.abc import Sequence

import numpy as np

_SMALLEST = 16


def bucket(size: int) -> int:
    """The next power of two, 16 at least."""
    return max(_SMALLEST, 1 << (size - 1).bit_length())


def padded(prompts: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """Ids [B, L] int32; padding is 0."""
    tokens_BxL = np.zeros((len(prompts), length), np.int32)
    for row_L, prompt in zip(tokens_BxL, prompts, strict=True):
        row_L[: len(prompt)] = prompt
    return tokens_BxL


def within(lengths_B, length: int):
    """Which of so many positions are of each sequence: 1, else 0; [B, L] int32."""
    return (np.arange(length) < lengths_B[:, None]).astype(np.int32)
