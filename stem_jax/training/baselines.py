"""Two plain baselines on the held-out documents: token frequencies of the training text, and xz.

They are there to be looked at beside the model's own figure, once, after the last step of a run. So
they take memory and time that do not grow with the text: of a large one, samples that are spread
over it, and the size of a sample is part of the result.
"""

import dataclasses
import itertools
import lzma
from collections.abc import Iterator

import numpy as np

from stem_jax.data.loader import ValidationBatches
from stem_jax.data.token_store import TokenStore
from stem_jax.data.tokenizer import Tokenizer

# Counted of the training text, in pieces of so many: two seconds, and 8 MiB of memory a piece.
_TOKENS = 2**27
_PIECE_TOKENS = 2**20
# Of text, and so of the dictionary: the encoder takes a second and 12 bytes of memory for each
# megabyte and byte of it.
_XZ_BYTES = 2**23
# A sample of the text is taken in pieces of so many tokens.
_XZ_TOKENS = 2**14


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A figure to compare a model with. sample: what it was taken from, "" if from everything."""

    name: str
    bits_per_byte: float
    sample: str


def token_unigrams(
    train: list[TokenStore], held_out: ValidationBatches, vocab_size: int
) -> Baseline:
    """Token frequencies of the training text, add-one smoothed."""
    total = sum(store.num_tokens for store in train)
    counts, counted = np.ones(vocab_size), 0
    for store in train:
        for piece in _spread(store.num_tokens, _PIECE_TOKENS, _TOKENS / total):
            counts += np.bincount(store.tokens[piece], minlength=vocab_size)
            counted += piece.stop - piece.start
    log2_p = np.log2(counts / counts.sum())
    bits = -float(log2_p @ _targets(held_out, vocab_size))
    sample = f"{counted:,} of {total:,} training tokens" if counted < total else ""
    return Baseline("token unigrams", bits / held_out.num_bytes, sample)


def xz(held_out: ValidationBatches, tokenizer: Tokenizer) -> Baseline:
    """`xz -9` on the held-out documents, one after the other."""
    sampled = held_out.num_bytes > _XZ_BYTES
    texts = _sampled_texts(held_out) if sampled else held_out.document_ids()
    # -9 is a dictionary of 64 MiB; one of the text's size finds the same.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": _XZ_BYTES}]
    encoder = lzma.LZMACompressor(filters=filters)
    read = written = 0
    specials = (tokenizer.bos_id, tokenizer.eos_id)
    for ids in texts:
        text = tokenizer.decode(int(i) for i in ids if i not in specials).encode()
        # Between two documents a line ends.
        text = b"\n" + text if read else text
        read += len(text)
        written += len(encoder.compress(text))
    written += len(encoder.flush())
    sample = f"{read:,} of {held_out.num_bytes:,} bytes" if sampled else ""
    return Baseline("xz -9", 8 * written / read, sample)


def _spread(size: int, piece: int, share: float) -> Iterator[slice]:
    """Pieces of [0, size) that hold this share of it, evenly spread; all of them from 1 on."""
    pieces = -(-size // piece)
    kept = min(pieces, max(1, round(pieces * share)))
    for index in range(kept):
        start = index * pieces // kept * piece
        yield slice(start, min(start + piece, size))


def _targets(held_out: ValidationBatches, vocab_size: int) -> np.ndarray:
    """[V] how often each token is scored: all but the first of each document."""
    counts = np.zeros(vocab_size)
    for store, end in held_out.scored_ends():
        for piece in _spread(end, _PIECE_TOKENS, 1):
            counts += np.bincount(store.tokens[piece], minlength=vocab_size)
        documents = int(np.searchsorted(store.document_starts, end))
        for piece in _spread(documents, _PIECE_TOKENS, 1):
            first = store.tokens[store.document_starts[piece]]
            counts -= np.bincount(first, minlength=vocab_size)
    return counts


def _sampled_texts(held_out: ValidationBatches) -> Iterator[np.ndarray]:
    """Ids of pieces of documents, spread over all of them."""
    for store, end in held_out.scored_ends():
        for piece in _spread(end, _XZ_TOKENS, _XZ_BYTES / held_out.num_bytes):
            starts = store.document_starts
            first, last = np.searchsorted(starts, [piece.start, piece.stop], side="right")
            inner = [int(start) for start in starts[first:last] if start > piece.start]
            edges = [piece.start, *(start for start in inner if start < piece.stop), piece.stop]
            for start, stop in itertools.pairwise(edges):
                yield np.asarray(store.tokens[start:stop])
