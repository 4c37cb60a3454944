"""The manual's table of large tables: its command, and every figure of it."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from stem_jax import cli
from stem_jax.config_file import load_config
from stem_jax.planning.table_plan import TablesPlan, plan_tables
from stem_jax.planning.table_text import bytes_text
from stem_jax.planning.topology import Topology

MANUAL = (Path(__file__).parent.parent.parent / "docs" / "planning.md").read_text()
_RESIDENT = "--config.ngram.resident_rows=134217728"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{1e3 * seconds:,.1f} ms"


def figures(offloaded: TablesPlan, resident: TablesPlan) -> dict[str, str]:
    """A column of the table, by the names of its lines."""
    load, bounds = offloaded.tables["ngram"].load, offloaded.bounds
    other = resident.tables["ngram"].load
    assert load and bounds and other and resident.bounds
    kept = bytes_text(other.tiers["device"].bytes)
    between = f", {bytes_text(other.network_bytes)}" if other.network_bytes else ""
    return {
        "rows": f"{load.num_rows:,}",
        "parameters": f"{load.parameters / 1e9:,.1f} G",
        "a host has of them": bytes_text(load.tiers["host"].bytes),
        "a chip has": bytes_text(load.tiers["device"].bytes),
        "keys of a step": f"{load.keys:,}",
        "its distinct rows, at most": f"{load.distinct_step:,}",
        "those of an owner": f"{load.distinct_owner:,}",
        "sent within slices": bytes_text(load.interconnect_bytes),
        "sent between slices": bytes_text(load.network_bytes),
        "rows of both, there and back": bytes_text(load.exchange_bytes),
        "hit rate, asked for evenly": f"{load.hit_rate:.3f}",
        "host to a chip": bytes_text(load.entering_bytes),
        "chip to its host": bytes_text(load.leaving_bytes),
        "matmuls": _seconds(bounds.compute),
        "interconnect": _seconds(bounds.interconnect),
        "network": _seconds(bounds.network),
        "link to the host": _seconds(bounds.link),
        "books": _seconds(bounds.books),
        "what binds": bounds.binds,
        "all rows on the devices: a chip has": kept,
        "then sent within, between": f"{bytes_text(other.interconnect_bytes)}{between}",
        "then interconnect": _seconds(resident.bounds.interconnect),
        "then network": _seconds(resident.bounds.network),
        "then binds": resident.bounds.binds,
    }


def columns() -> list[dict[str, str]]:
    """Of the manual's command, and of what it says to add."""
    block = re.search(r"```bash\n(python -m stem_jax\.plan --tables.*v5p.*\n(?:.*\n)+?)```", MANUAL)
    command = shlex.split(block[1].replace("\\\n", ""))[3:]
    slices = "--slices=2 --config.mesh.data=2 --config.train.global_batch_size=1024"
    wide = "--config.ngram.keys_per_head=61036000 --config.ngram.width=8192"
    assert f"`{slices}`" in MANUAL and f"`{wide}`" in MANUAL
    found = []
    for size in ("", wide):
        for pod in ("", slices):
            argv = [*command, *size.split(), *pod.split()]
            without = [flag for flag in argv if flag != _RESIDENT]
            assert len(without) < len(argv)
            found.append(figures(*map(_plan, (argv, without))))
    return found


def _plan(argv: list[str]) -> TablesPlan:
    flags, overrides = cli.split_overrides(argv)
    given = dict(flag.partition("=")[::2] for flag in flags)
    topology = Topology.parse(given["--topology"], int(given.get("--slices", 1)))
    return plan_tables(load_config(given["--config"], overrides), topology)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: no TPU topologies"
)
def test_the_manuals_table_is_what_its_command_says():
    lines = re.findall(r"^\| (.+) \|$", MANUAL, re.MULTILINE)
    table = {name: cells for name, *cells in (line.split(" | ") for line in lines)}
    of_all = columns()
    for name in of_all[0]:
        assert table[name] == [column[name] for column in of_all], name
