"""Static sizes of a step's row blocks and of its exchange, and the few levels they come in.

Every set of sizes is a program of its own, so there are four: what the first batch needs and so
much more that a batch like it hardly ever needs another, two larger ones, and room for any batch.
One level stands for all sizes of a step. No sum depends on the level, so which one a step takes is
nobody else's business.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from stem_jax.tables.hops import Hop

# How much larger than the first batch's needs the sizes of a level are; after these, the largest.
_FACTORS = (1.03, 1.25, 1.6)
LEVELS = len(_FACTORS) + 1
# Few rows vary much from batch to batch, and room for them costs next to nothing: square roots of
# the count beside the factor, and the least rooms. A pair's count is the most of many already.
_SPREAD, _SPREAD_OF_PAIRS = 4, 0.5
_SMALLEST_BLOCK, _SMALLEST_PAIR = 256, 16
# Batches vary by noise: it is rare that one leaps over the last quarter of what is left to them.
_NEARLY = 0.75
# Standard deviations of the rows of a pair by which the busiest one exceeds the mean.
_BUSIEST = 3


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """What a batch needs, or what there is room for.

    unique: U, distinct rows of a device. owned: O, rows asked of an owner. pairs: in each hop of
    the exchange, rows that a device asks a peer for. relayed: after each hop but the last, distinct
    rows of a relay.
    """

    unique: int
    owned: int
    pairs: tuple[int, ...] = ()
    relayed: tuple[int, ...] = ()

    @property
    def numbers(self) -> tuple[int, ...]:
        """All sizes in the order of the fields."""
        return (self.unique, self.owned, *self.pairs, *self.relayed)

    def with_numbers(self, numbers) -> "BlockSizes":
        """Other sizes of the same hops."""
        first, hops = 2, len(self.pairs)
        return BlockSizes(
            numbers[0],
            numbers[1],
            tuple(numbers[first : first + hops]),
            tuple(numbers[first + hops :]),
        )

    def hold(self, needed: "BlockSizes") -> bool:
        """Whether a batch with these needs fits."""
        return all(n <= room for n, room in zip(needed.numbers, self.numbers, strict=True))


Sizes = tuple[BlockSizes, ...]


def largest_sizes(
    keys: int, num_rows: int, hops: tuple[Hop, ...], owners: int, copies: int
) -> BlockSizes:
    """Sizes that hold any batch: every key distinct, every device asking one owner.

    Args:
        keys: of one device.
        num_rows: V_pad.
        owners: P. copies: of each owner.
    """
    unique = room = min(keys, num_rows)
    behind, pairs, rooms = num_rows, [], []
    for hop in hops:
        # A peer can be asked for no more rows than it and all behind it have.
        behind //= hop.peers
        pairs.append(min(room, behind))
        room = min(hop.peers * pairs[-1], behind)
        rooms.append(room)
    owned = min(num_rows // owners, owners * copies * unique)
    return BlockSizes(unique, owned, tuple(pairs), tuple(rooms[:-1]))


def expected_needs(
    distinct: Callable[[int], float],
    num_keys: int,
    hops: tuple[Hop, ...],
    owners: int,
    copies: int,
) -> BlockSizes:
    """What to expect of a batch whose rows are spread over their owners evenly.

    Args:
        distinct: gives the distinct keys of so many devices together.
        num_keys: of the table.
    """
    pairs, rooms, devices, behind = [], [], 1, 1
    for hop in hops:
        mean = distinct(devices) / behind / hop.peers
        behind *= hop.peers
        # The busiest of thousands of pairs, if rows were thrown at owners; none has more than all.
        pairs.append(math.ceil(min(mean + _BUSIEST * math.sqrt(mean), num_keys / behind)))
        devices *= hop.peers
        rooms.append(math.ceil(distinct(devices) / behind))
    owned = math.ceil(distinct(owners * copies) / owners)
    return BlockSizes(math.ceil(distinct(1)), owned, tuple(pairs), tuple(rooms[:-1]))


def expected_distinct(tokens: int, shares_V: np.ndarray) -> float:
    """How many keys so many independent tokens have; shares_V: probability of each key."""
    return float(np.sum(-np.expm1(tokens * np.log1p(-shares_V))))


def sizes_at(level: int, first: BlockSizes, largest: BlockSizes) -> BlockSizes:
    """The sizes of a level, from 0.

    Args:
        first: what the first batch needed.
        largest: from `largest_sizes`.
    """
    if level == LEVELS - 1:
        return largest
    hops = len(first.pairs)
    kinds = [(_SMALLEST_BLOCK, _SPREAD)] * 2 + [(_SMALLEST_PAIR, _SPREAD_OF_PAIRS)] * hops
    kinds += [(_SMALLEST_BLOCK, _SPREAD)] * len(first.relayed)
    grown = [
        max(least, _rounded(n * _FACTORS[level] + spread * math.sqrt(n)))
        for n, (least, spread) in zip(first.numbers, kinds, strict=True)
    ]
    return largest.with_numbers(
        [min(n, most) for n, most in zip(grown, largest.numbers, strict=True)]
    )


def choose_sizes(needed: BlockSizes, first: BlockSizes, largest: BlockSizes) -> BlockSizes:
    """The sizes of the lowest level that holds a batch."""
    return sizes_at(level_of(needed, first, largest), first, largest)


def levels_above(
    sizes: Sizes, firsts: Sequence[BlockSizes], largest: Sequence[BlockSizes]
) -> list[Sizes]:
    """The larger sizes that a step may come to need, the smallest of them first.

    Args:
        sizes: of several tables, at one level. firsts, largest: of each, see `sizes_at`.
    """
    pairs = list(zip(firsts, largest, strict=True))
    levels = dict.fromkeys(
        tuple(sizes_at(level, *pair) for pair in pairs) for level in range(LEVELS)
    )
    return [
        level
        for level in levels
        if level != sizes and all(new.hold(old) for new, old in zip(level, sizes, strict=True))
    ]


def level_of(needed: BlockSizes, first: BlockSizes, largest: BlockSizes) -> int:
    """The lowest level that holds a batch."""
    return next(n for n in range(LEVELS) if sizes_at(n, first, largest).hold(needed))


def nearly_filled(sizes: BlockSizes, needed: BlockSizes, first: BlockSizes) -> bool:
    """Whether a batch takes most of the room that these sizes leave beyond the first one."""
    lines = zip(sizes.numbers, needed.numbers, first.numbers, strict=True)
    return any(n - begun > _NEARLY * (room - begun) for room, n, begun in lines if room > begun)


def _rounded(size: float) -> int:
    """The next number with four binary digits before its zeros: another start finds the same."""
    size = math.ceil(size)
    step = 1 << max(0, (size - 1).bit_length() - 4)
    return -(-size // step) * step
