"""Hashed n-grams as a memory (Engram, arXiv 2601.07372): a token with those before it is a key.

A layer that reads has for each order n = 2..N and each of H heads a table of its own, with a prime
number of keys, and finds in it

    (m_0 t_i  xor  m_1 t_{i-1}  xor ... xor  m_{n-1} t_{i-n+1})  mod  prime

with odd multipliers of its own. An n-gram ends at an eos token and where its document begins: what
lies before counts as eos. Multipliers, primes and this rule are those of transformers' `qwen4_exp`,
so its tables can be read and written (`interop.engram_names`).

All of these tables are one here, one after the other, and a token has K = layers (N - 1) H keys in
it: by layer, then by order, then by head. Example with two layers, N 2, H 2 and 10 keys a head: the
heads have 11, 13, 17 and 19 keys, and a padding of 8 puts the second layer's from key 24 on.
"""

import dataclasses
import functools
import math

import numpy as np

from stem_jax.errors import InputError
from stem_jax.memory.preceding import preceding

NGRAM = "ngram"
# Names of readers that take rows of n-grams, and of value embeddings.
ENGRAM, EMBEDDING = "engram", "embedding"
# Row numbers are int32.
MOST_KEYS = 2**31 - 1
_MASK = 2**64 - 1
# Of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# What the seeds of two layers that follow each other differ by.
_LAYER_SEED = 10007


@dataclasses.dataclass(frozen=True)
class NGramMemory:
    """See `Memory`.

    vocab_size: V. layers: that read it, rising. max_order: N. heads: H of each order.
    keys_per_head: the primes are the first that are not smaller. total_width: E, of a token's rows
    of one layer, one behind the other. seed: of the multipliers. eos_id: that n-grams end at.
    pad_multiple: that each layer's keys are filled up to.

    Raises:
        InputError: names the value, its key of the configuration and the remedy.
    """

    vocab_size: int
    layers: tuple[int, ...]
    max_order: int
    heads: int
    keys_per_head: int
    total_width: int
    seed: int
    eos_id: int | None
    pad_multiple: int = 128
    name: str = NGRAM
    reader: str = ENGRAM

    def __post_init__(self):
        for field, least in (("max_order", 2), ("heads", 1), ("pad_multiple", 1)):
            if (value := getattr(self, field)) < least:
                raise InputError(f"ngram.{field}={value} must be at least {least}")
        if not self.layers or list(self.layers) != sorted({*self.layers}):
            raise InputError(
                f"ngram.layers={self.layers} must be one or more layers, each once, rising"
            )
        if self.total_width < 1 or self.total_width % self.keys_of_layer:
            raise InputError(
                f"ngram.width={self.total_width} does not divide over the {self.keys_of_layer} "
                f"rows of a token, {self.heads} heads (ngram.heads) for each order from 2 to "
                f"ngram.max_order={self.max_order}; use a multiple of {self.keys_of_layer}"
            )
        if self.keys_per_head < self.vocab_size:
            raise InputError(
                f"ngram.keys_per_head={self.keys_per_head} is below the vocabulary, "
                f"model.vocab_size={self.vocab_size}, so that single tokens would collide; use as "
                "many or more"
            )
        if self.eos_id is None or not 0 <= self.eos_id < self.vocab_size:
            raise InputError(
                f"an ngram memory needs the id of eos, at which n-grams end, and eos_id="
                f"{self.eos_id} is none of the {self.vocab_size} ids of the vocabulary; use a "
                "tokenizer that has an eos token, or set ngram.eos_id to one of them"
            )
        # First by what they are at least: large primes would take long to find.
        least = len(self.layers) * self.keys_of_layer * self.keys_per_head
        if least > MOST_KEYS or self.num_keys > MOST_KEYS:
            raise InputError(
                f"ngram.keys_per_head={self.keys_per_head} for each of "
                f"{len(self.layers) * self.keys_of_layer} heads (layers x (max_order - 1) x heads) "
                f"are more than the {MOST_KEYS} rows that a table may have; use fewer"
            )

    @property
    def num_keys(self) -> int:
        """Of the table, with the padding of each layer."""
        return self.block(len(self.layers) - 1).stop

    @property
    def vectors(self) -> int:
        """S: a row is one vector."""
        return 1

    @property
    def width(self) -> int:
        """F, of one row."""
        return self.total_width // self.keys_of_layer

    @property
    def reach(self) -> int:
        """Tokens before its own that a key depends on."""
        return self.max_order - 1

    @property
    def keys_of_layer(self) -> int:
        """(N - 1) H, of each token."""
        return (self.max_order - 1) * self.heads

    @functools.cached_property
    def head_sizes(self) -> tuple[tuple[int, ...], ...]:
        """Keys of each head, by layer; orders one after the other, H each. All are prime."""
        count = self.keys_of_layer
        primes = _primes(self.keys_per_head, len(self.layers) * count)
        return tuple(primes[first : first + count] for first in range(0, len(primes), count))

    @functools.cached_property
    def head_offsets(self) -> tuple[tuple[int, ...], ...]:
        """The first key of each head, by layer."""
        found, first = [], 0
        for sizes in self.head_sizes:
            ends = np.cumsum(sizes)
            found.append(tuple((first + ends - sizes).tolist()))
            first += -(-int(ends[-1]) // self.pad_multiple) * self.pad_multiple
        return tuple(found)

    @functools.cached_property
    def multipliers(self) -> tuple[tuple[int, ...], ...]:
        """m_0 .. m_{N-1} of each layer: odd, and small enough that products fit into 63 bits."""
        half = max(1, (2**63 - 1) // self.vocab_size // 2)
        seeds = [self.seed + _LAYER_SEED * place for place in range(len(self.layers))]
        return tuple(
            tuple(
                2 * (_split_mix(seed + _GAMMA * (number + 1)) % half) + 1
                for number in range(self.max_order)
            )
            for seed in seeds
        )

    def block(self, place: int) -> slice:
        """The keys of the layer at a place in `layers`, padding included."""
        first, size = self.head_offsets[place][0], sum(self.head_sizes[place])
        return slice(first, first + -(-size // self.pad_multiple) * self.pad_multiple)

    def keys(self, tokens_BxL, segment_ids_BxL, before_BxR=None):
        """See `Memory`; int32 [..., L, K], of arrays of NumPy on the host, of JAX on the device."""
        if not isinstance(tokens_BxL, np.ndarray):
            # Here, so that the loader's threads know of no JAX.
            from stem_jax.memory.ngram_on_device import keys_on_device

            return keys_on_device(self, tokens_BxL, segment_ids_BxL, before_BxR)
        read = preceding(
            tokens_BxL.astype(np.int64), segment_ids_BxL, before_BxR, self.reach, self.eos_id
        )
        keys = np.empty((*tokens_BxL.shape, len(self.layers) * self.keys_of_layer), np.int32)
        number = 0
        for multipliers, sizes, offsets in zip(
            self.multipliers, self.head_sizes, self.head_offsets
        ):
            sizes_K, offsets_K = np.array(sizes), np.array(offsets)
            mixed = read[0] * multipliers[0]
            for order in range(1, self.max_order):
                mixed = mixed ^ read[order] * multipliers[order]
                heads = slice((order - 1) * self.heads, order * self.heads)
                found = mixed[..., None] % sizes_K[heads] + offsets_K[heads]
                keys[..., number : number + self.heads] = found
                number += self.heads
        return keys

    def reads(self, layer: int) -> tuple[slice, int] | None:
        """See `Memory`."""
        if layer not in self.layers:
            return None
        first = self.layers.index(layer) * self.keys_of_layer
        return slice(first, first + self.keys_of_layer), 0


def _split_mix(state: int) -> int:
    """The 64 bits that SplitMix64 makes of one state."""
    bits = (state + _GAMMA) & _MASK
    bits = ((bits ^ bits >> 30) * _MIX_1) & _MASK
    bits = ((bits ^ bits >> 27) * _MIX_2) & _MASK
    return bits ^ bits >> 31


@functools.lru_cache
def _primes(least: int, count: int) -> tuple[int, ...]:
    """The first so many primes from `least` on."""
    found: list[int] = []
    number = max(2, least)
    while len(found) < count:
        if all(number % divisor for divisor in range(2, math.isqrt(number) + 1)):
            found.append(number)
        number += 1
    return tuple(found)
