"""Groups of devices in every notation that XLA prints, as its own parser reads them."""

import pytest

from stem_jax.planning.device_groups import device_groups

# Each as printed by the libraries of jax 0.10 to 0.12; the groups by hand.
NOTATIONS = [
    ("replica_groups={{0,2},{1,3}}", 4, [[0, 2], [1, 3]]),
    ("replica_groups=[2,2]<=[4]", 4, [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", 4, [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", 4, [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=1,'b'=4] {'a','b'}", 4, [[0, 1, 2, 3]]),
    ("replica_groups={}", 4, [[0, 1, 2, 3]]),
    ("source_target_pairs={{0,1},{1,0}}", 4, [[0, 1], [1, 0]]),
    # A mesh of devices that are not in their order: as an array reordered, or listed.
    (
        "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}",
        8,
        [[0, 2, 4, 6], [1, 3, 5, 7]],
    ),
    (
        "replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}",
        8,
        [[0, 4, 1, 5], [2, 6, 3, 7]],
    ),
    (
        "replica_groups=mesh['a'=2,'b'=4], device_ids=(0,2,1,3,4,6,5,7) {'b'}",
        8,
        [[0, 2, 1, 3], [4, 6, 5, 7]],
    ),
    (
        "replica_groups=mesh['a'=2,'b'=2,'c'=2], device_ids=([2,2,2]T(2,1,0)) {'a'}",
        8,
        [[0, 1], [4, 5], [2, 3], [6, 7]],
    ),
    # Half of an axis: its outer and its inner part.
    ("replica_groups=mesh['a'=8] {'a':(1)2}", 8, [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['a'=8] {'a':(4)2}", 8, [[0, 1], [2, 3], [4, 5], [6, 7]]),
    (
        "replica_groups=mesh['a'=2,'b'=4] {'a','b':(2)2}",
        8,
        [[0, 1, 4, 5], [2, 3, 6, 7]],
    ),
]


@pytest.mark.parametrize(("text", "devices", "groups"), NOTATIONS)
def test_groups_are_read_in_every_notation(text, devices, groups):
    assert device_groups(f"channel_id=1, {text}, use_global_device_ids=true", devices) == groups


@pytest.mark.parametrize("text", [text for text, _, _ in NOTATIONS if "replica_groups" in text])
def test_the_notations_are_those_of_xla(text):
    """The compiler's parser reads each and prints it again as it stands here."""
    hlo = pytest.importorskip("jaxlib._hlo")
    devices = next(n for t, n, _ in NOTATIONS if t == text)
    program = f"""HloModule m, num_partitions={devices}
add {{
  a = f32[] parameter(0)
  b = f32[] parameter(1)
  ROOT s = f32[] add(a, b)
}}
ENTRY e {{
  p = f32[8]{{0}} parameter(0)
  ROOT r = f32[8]{{0}} all-reduce(p), channel_id=1, {text}, use_global_device_ids=true, to_apply=add
}}"""
    assert text in hlo.hlo_module_from_text(program).to_string()


def test_an_unknown_notation_is_not_one_group_of_all():
    with pytest.raises(ValueError, match=r"unknown notation: tiles\[2\]"):
        device_groups("channel_id=1, replica_groups=tiles[2], x=1", 4)
