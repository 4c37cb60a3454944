"""Which devices stand between a device and a row's owner.

With thousands of owners a device wants a handful of rows of each, and buffers with room for the
most that any pair needs are mostly empty. So the owners are numbered by up to three digits and a
request is handed on digit by digit: first to the neighbour whose last digit is the owner's, which
asks for each row once whoever of its neighbours wants it, then on from there. Slices of TPUs are
the last hop, so a slice asks another one for each distinct row once.

Example: 6 owners as 2 x 3. Owner 5 has the digits 1 2. Device 0 (0 0) sends a request for it to
device 2 (0 2), its neighbour in the group 0 1 2, and that one to device 5, in its group 2 5.
"""

import dataclasses
import functools
import math

from jax.sharding import Mesh

from stem_jax.mesh import axis_size, slice_of

# Peers of a device in one hop. 32k tokens of a device want some 11,000 distinct rows by Zipf's law:
# 180 of each of 64 peers, and the busiest pair a fifth more.
MOST_PEERS = 64
MOST_HOPS = 3


@dataclasses.dataclass(frozen=True)
class Hop:
    """One digit of an owner's number: (owner // stride) % peers."""

    peers: int
    stride: int

    def groups(self, num_owners: int) -> list[list[int]]:
        """The owners that differ in this digit alone, together, in the order of the digit."""
        firsts = (n for n in range(num_owners) if n // self.stride % self.peers == 0)
        return [[first + k * self.stride for k in range(self.peers)] for first in firsts]


def owner_hops(mesh: Mesh, vocab_axes: tuple[str, ...]) -> tuple[Hop, ...]:
    """The hops of a request in their order; none where one owner has all rows.

    Args:
        vocab_axes: mesh axes that shard the rows, the first of them the outermost.
    """
    owners = axis_size(mesh, vocab_axes)
    slices = len(set(slice_of(list(mesh.devices.flat)))) if "data" in vocab_axes else 1
    if slices == 1:
        return _contiguous(owners, MOST_HOPS)
    # Slices follow each other along data.
    inside = mesh.shape["data"] // slices
    if vocab_axes[0] == "data":
        stride = owners // slices
        return (*_contiguous(stride, MOST_HOPS - 1), Hop(slices, stride))
    stride = axis_size(mesh, vocab_axes[vocab_axes.index("data") + 1 :])
    data = stride * mesh.shape["data"]
    found = (
        Hop(stride, 1),
        Hop(inside, stride),
        Hop(owners // data, data),
        Hop(slices, stride * inside),
    )
    return tuple(hop for hop in found if hop.peers > 1)


def _contiguous(owners: int, most: int) -> tuple[Hop, ...]:
    hops, stride = [], 1
    for peers in reversed(factors(owners, most, MOST_PEERS)):
        hops.append(Hop(peers, stride))
        stride *= peers
    return tuple(hops)


@functools.cache
def factors(number: int, most: int, largest: int) -> tuple[int, ...]:
    """As few factors, rising, as have none over `largest`, and those as equal as they can be.

    At most `most` of them: where that is too few, the largest is as small as it can be.
    """
    if number == 1:
        return ()
    best = (number,)
    for count in range(1, most + 1):
        found = min(_products(number, count, 2), key=lambda f: (f[-1], -f[0]), default=best)
        if found[-1] < best[-1]:
            best = found
        if best[-1] <= largest:
            break
    return best


def _products(number: int, count: int, least: int):
    """All ways to write a number as `count` rising factors from `least` on."""
    if count == 1:
        if number >= least:
            yield (number,)
        return
    for first in range(least, math.isqrt(number) + 1):
        if number % first == 0:
            for rest in _products(number // first, count - 1, first):
                yield (first, *rest)
