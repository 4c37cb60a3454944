"""Documents that say again what others say: left out, the ones that are tested on last."""

import hashlib
from collections.abc import Sequence

import numpy as np

from stem_jax.errors import InputError

# Of their runs of words, two documents share this much of all that either has: near duplicates.
NEAR = 0.5
_PERMUTATIONS = 126
# Bands and rows: of two documents at NEAR one in 270 is missed, at .6 one in 30,000.
_BANDS = (42, 3)


def find_duplicates(texts: Sequence[str], runs: Sequence[np.ndarray]) -> list[tuple[str, int]]:
    """How each document stands to those before it: ("exact" | "near" | "", index of that one).

    A document that says what an earlier one does, of those that stay, is a duplicate; so whatever
    comes first stays, and what must not lose comes first. Candidates come from MinHash (datasketch,
    whose hashes are fixed), and are kept where the shared part of the runs themselves is at least
    NEAR.

    Args:
        runs: of each text, [n] uint64, sorted and distinct (`WordRuns.of`).

    Raises:
        InputError: datasketch is missing.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise InputError(
            "near duplicates are found with datasketch, which is missing: pip install datasketch"
        ) from error
    index = MinHashLSH(num_perm=_PERMUTATIONS, params=_BANDS)
    first: dict[bytes, int] = {}
    found: list[tuple[str, int]] = []
    # One for all: to draw the permutations costs more than to use them.
    template = MinHash(num_perm=_PERMUTATIONS, seed=1, hashfunc=_same, scheme="affine64")
    for number, (text, runs_n) in enumerate(zip(texts, runs, strict=True)):
        digest = hashlib.sha256(text.encode()).digest()
        if digest in first:
            found.append(("exact", first[digest]))
            continue
        sketch = template.copy()
        sketch.update_batch(runs_n)
        near = sorted(other for other in index.query(sketch) if shared(runs_n, runs[other]) >= NEAR)
        found.append(("near", near[0]) if near else ("", -1))
        # Exact copies of a near duplicate are one of what stays, too.
        first[digest] = near[0] if near else number
        if not near:
            index.insert(number, sketch)
    return found


def shared(one_n: np.ndarray, other_n: np.ndarray) -> float:
    """Runs that two documents share / runs that either has (Jaccard); 0 for two without runs."""
    both = len(np.intersect1d(one_n, other_n, assume_unique=True))
    either = len(one_n) + len(other_n) - both
    return both / either if either else 0.0


def _same(run: np.uint64) -> np.uint64:
    """Runs are hashes already."""
    return run
