"""What the host has left, and the refusal of tables that do not fit."""

import pytest

from stem_jax.errors import InputError
from stem_jax.run_checks import check_hosts
from stem_jax.tables.host_memory import available_host_bytes, check_host_memory

MEMINFO = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 5000 kB\n"}
V2 = "sys/fs/cgroup/"
V1 = "sys/fs/cgroup/memory/"


def test_the_refusal_names_both_figures_and_remedies():
    with pytest.raises(
        InputError, match=r"12\.00 GiB on this host, 1\.50 GiB are available; give .* use more"
    ):
        check_host_memory(12 << 30, 3 << 29)
    check_host_memory(12 << 30, 12 << 30)
    check_host_memory(12 << 30, None)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MEMINFO, 5000 << 10),
        # Version 2: what the group uses, without the page cache that it can drop.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                V2 + "a/b/memory.max": "4096000",
                V2 + "a/b/memory.current": "1096000",
                V2 + "a/b/memory.stat": "file 9\ninactive_file 500\n",
            },
            3_000_500,
        ),
        # A limit of a group above, none of its own.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                V2 + "a/b/memory.max": "max",
                V2 + "a/b/memory.current": "1000",
                V2 + "a/memory.max": "3000",
                V2 + "a/memory.current": "1000",
            },
            2000,
        ),
        # A container: the path is the host's, the files are at the top. Version 1.
        (
            {
                "proc/self/cgroup": "5:cpu:/\n4:memory:/docker/c0ffee\n",
                V1 + "memory.limit_in_bytes": "70000",
                V1 + "memory.usage_in_bytes": "20000",
                V1 + "memory.stat": "inactive_file 1\ntotal_inactive_file 5000\n",
            },
            55_000,
        ),
        # Over its limit already.
        (
            {
                "proc/self/cgroup": "0::/\n",
                V2 + "memory.max": "10",
                V2 + "memory.current": "20",
            },
            0,
        ),
    ],
)
def test_available_memory_is_the_smallest_bound(tmp_path, files, expected):
    # The kernel's figure is larger than those of the groups.
    for name, text in ({**MEMINFO, **files} if files else {}).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert available_host_bytes(tmp_path) == expected


def test_this_system_tells_its_memory():
    assert available_host_bytes() is None or available_host_bytes() > 2**20


def test_the_processes_of_a_host_share_its_memory():
    """Each fits alone; Slurm starts eight on a host."""
    fits = [("a", 3 << 30, 8 << 30), ("b", 3 << 30, 8 << 30), ("a", 3 << 30, 7 << 30)]
    check_hosts(fits)
    message = r"9\.00 GiB on host a for its 3 processes, 7\.00 GiB are available"
    with pytest.raises(InputError, match=message):
        check_hosts([*fits, ("a", 3 << 30, None)])
    with pytest.raises(InputError, match=r"9\.00 GiB on host b, 8\.00 GiB are available"):
        check_hosts([("a", 3 << 30, 8 << 30), ("b", 9 << 30, 8 << 30)])
    check_hosts([("a", 3 << 30, None)] * 8)
