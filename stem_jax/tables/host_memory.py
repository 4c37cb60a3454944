"""How much memory the host has left for tables, and the refusal when that is too little."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from stem_jax.errors import InputError
from stem_jax.tables.spec import TableSpec

_GIB = 2**30


def available_host_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still allocate; None where the system does not tell.

    The smallest of what the kernel counts as available and what is left under the memory limits of
    the process's control groups (v1 or v2), whose page cache can be reclaimed.

    Args:
        root: of the file system with /proc and /sys.
    """
    bounds = [*_kernel_bound(root), *_group_bounds(root)]
    return max(0, min(bounds)) if bounds else None


def check_host_memory(
    needed_bytes: int,
    available_bytes: int | None,
    where: str = "this host",
    specs: Sequence[TableSpec] = (),
) -> None:
    """Refuses tables that do not fit, before anything is allocated.

    Args:
        needed_bytes: of the part of the tables that lies there.
        available_bytes: from `available_host_bytes`; None checks nothing.
        where: the host, for the message.
        specs: the tables, likewise.

    Raises:
        InputError: both figures and the remedies.
    """
    if available_bytes is not None and needed_bytes > available_bytes:
        keys = " and ".join(spec.resident_key for spec in specs) or "resident_rows"
        sizes = ", ".join(dict.fromkeys(key for spec in specs for key in spec.size_keys))
        raise InputError(
            f"with {keys} rows are kept in host memory: {needed_bytes / _GIB:.2f} GiB on {where}, "
            f"{available_bytes / _GIB:.2f} GiB are available; give the host or its container more "
            f"memory, use more hosts, lower {sizes or 'sizes of the tables'}, or leave {keys} "
            "unset to keep all rows on devices"
        )


def _kernel_bound(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _group_bounds(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, names = "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # A limit holds for all groups below it. Inside a container the path may be the host's and
        # not exist; the group's files then lie at the top.
        top = root / base
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            limit, usage = _number(folder / names[0]), _number(folder / names[1])
            if limit is not None and usage is not None:
                yield limit - usage + _statistic(folder / "memory.stat", names[2])
            if folder == top:
                break


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        # Not Linux, or no such group: no bound from here.
        return []


def _number(path: Path) -> int | None:
    text = " ".join(_lines(path))
    return int(text) if text.isdigit() else None


def _statistic(path: Path, name: str) -> int:
    return sum(int(line.split()[1]) for line in _lines(path) if line.split()[:1] == [name])
