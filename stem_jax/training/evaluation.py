"""Validation: cross-entropy and bits per byte on held-out documents, and two plain baselines."""

import dataclasses
import lzma
import math
from collections.abc import Iterable

import jax
import numpy as np

from stem_jax.data.loader import ValidationBatches
from stem_jax.data.token_store import TokenStore
from stem_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Validation:
    """Result on the held-out documents. loss: nats per scored token. tokens: scored tokens."""

    loss: float
    bits_per_byte: float
    tokens: int

    def metrics(self) -> dict[str, float]:
        """As a metrics record."""
        return {
            "eval/loss": self.loss,
            "eval/bits_per_byte": self.bits_per_byte,
            "eval/tokens": self.tokens,
        }


def summarize(sums: Iterable[tuple[jax.Array, jax.Array]], num_bytes: int) -> Validation:
    """Adds up (nats, scored tokens) over batches.

    Args:
        num_bytes: UTF-8 bytes of the text that was scored.
    """
    nats, tokens = zip(*((float(total), int(count)) for total, count in list(sums)), strict=True)
    total = math.fsum(nats)
    return Validation(total / sum(tokens), total / math.log(2) / num_bytes, sum(tokens))


def unigram_bits_per_byte(
    train: list[TokenStore], held_out: ValidationBatches, vocab_size: int
) -> float:
    """Bits per byte of the token frequencies of the training text, add-one smoothed."""
    counts = np.ones(vocab_size)
    for store in train:
        counts += np.bincount(store.tokens, minlength=vocab_size)
    log2_p = np.log2(counts / counts.sum())
    bits = -sum(float(log2_p[ids[1:]].sum()) for ids in held_out.document_ids())
    return bits / held_out.num_bytes


def xz_bits_per_byte(held_out: ValidationBatches, tokenizer: Tokenizer) -> float:
    """Bits per byte of `xz -9` on the held-out documents, one after the other."""
    specials = (tokenizer.bos_id, tokenizer.eos_id)
    texts = (
        tokenizer.decode(int(i) for i in ids if i not in specials)
        for ids in held_out.document_ids()
    )
    text = "\n".join(texts).encode()
    return 8 * len(lzma.compress(text, preset=9)) / len(text)
