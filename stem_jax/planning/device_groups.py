"""The groups of devices that a collective joins, in any of the notations of XLA.

replica_groups={{0,1},{2,3}}                listed
replica_groups=[2,4]<=[4,2]T(1,0)           0, 1, ... as an array, reordered, cut up
replica_groups=mesh['a'=2,'b'=4] {'b'}      along axes of a mesh of the devices in their order, or
  ..., device_ids=([4,2]T(1,0)) {'b'}       in another: an array as above, or a list
replica_groups=mesh['a'=8] {'a':(2)4}       along a part of an axis: 4 after 2 others
source_target_pairs={{0,1},{1,0}}           who sends to whom
"""

import math
import re

_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))? \{([^}]*)\}"
)
_ANY = re.compile(r"(?:replica_groups|source_target_pairs)=(?!\{\})(.{0,60})")
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def device_groups(attributes: str, devices: int) -> list[list[int]]:
    """Groups of a collective of these attributes among so many devices.

    Raises:
        ValueError: a notation that is not known, which would be counted as one group of all.
    """
    if found := _LISTED.search(attributes):
        return [_numbers(group) for group in re.findall(r"\{([\d, ]+)\}", found.group(1))]
    if found := _IOTA.search(attributes):
        shape, sizes, order = (_numbers(part or "") for part in found.groups())
        return _chunks(_transposed(list(range(math.prod(sizes))), sizes, order), shape[-1])
    if found := _MESH.search(attributes):
        return _mesh_groups(*found.groups())
    if found := _ANY.search(attributes):
        raise ValueError(f"groups of devices in an unknown notation: {found.group(1)}")
    return [list(range(devices))]


def _mesh_groups(axes: str, iota: str, order: str, listed: str, joined: str) -> list[list[int]]:
    # Axes in parts, so that what is joined is always whole dimensions.
    cuts = {name: (int(before), int(size)) for name, before, size in _AXIS.findall(joined) if size}
    sizes: list[int] = []
    parts: dict[str, int] = {}
    for name, size in re.findall(r"'([^']+)'=(\d+)", axes):
        before, taken = cuts.get(name, (1, int(size)))
        parts[name] = len(sizes) + 1
        sizes += [before, taken, int(size) // before // taken]
    together = [parts[name] for name, _, _ in _AXIS.findall(joined)]
    apart = [place for place in range(len(sizes)) if place not in together]
    ids = _numbers(listed or "") or list(range(math.prod(sizes)))
    if iota:
        ids = _transposed(ids, _numbers(iota), _numbers(order or ""))
    group = math.prod(sizes[place] for place in together)
    return _chunks(_transposed(ids, sizes, apart + together), group)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part.strip()]


def _transposed(values: list[int], sizes: list[int], order: list[int]) -> list[int]:
    """The values as an array of these sizes, its dimensions reordered, flattened."""
    strides = [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]
    places = [0]
    for dimension in order or range(len(sizes)):
        places = [p + i * strides[dimension] for p in places for i in range(sizes[dimension])]
    return [values[place] for place in places]


def _chunks(values: list[int], size: int) -> list[list[int]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
