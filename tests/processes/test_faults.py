"""Runs of two processes that go on after faults end as if nothing had happened."""

import os
from pathlib import Path

import jax
import pytest

from benchmarks.faults import FAULTS, campaign


@pytest.mark.long
def test_nothing_is_lost_with_rows_on_disk(tmp_path):
    names = ["newest checkpoint lacks a file", "kill -9 of all"]
    cache = Path(jax.config.jax_compilation_cache_dir)
    records = campaign(tmp_path, rounds=2, seed=6, every=5, faults=names, cache=cache, disk=True)
    assert [record["fault"] for record in records] == names
    assert all(record["lost_steps"] - record["in_flight"] <= 5 for record in records)


@pytest.mark.long
def test_nothing_is_lost_by_faults(tmp_path):
    names = ["newest checkpoint truncated", "kill -9 of the coordinator"]
    # Mounting a small disk needs root.
    names += ["full disk"] if os.geteuid() == 0 else ["newest checkpoint lacks a file"]
    assert set(names) <= set(FAULTS)
    cache = Path(jax.config.jax_compilation_cache_dir)
    records = campaign(tmp_path, rounds=3, seed=5, every=5, faults=names, cache=cache)
    assert [record["fault"] for record in records] == names
    assert all(record["lost_steps"] - record["in_flight"] <= 5 for record in records)
    assert [record["exit_status"] == 0 for record in records] == [True, False, False]
