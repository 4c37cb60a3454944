"""Runs of several processes that go on after faults end as if nothing had happened."""

import json
import os
from pathlib import Path

import jax
import pytest

from benchmarks.faults.campaign import Campaign
from benchmarks.faults.kinds import FAULTS, possible
from benchmarks.faults.plan import planned
from benchmarks.faults.report import reshape_table, table, time_table
from benchmarks.faults.reshape import Reshaping, planned_shapes
from benchmarks.faults.run import Shape
from stem_jax.goodput.account import PARTS

# Seconds of train.step_timeout: none of these faults waits for it, and a machine may be busy.
PATIENCE = 600


def cache() -> Path:
    return Path(jax.config.jax_compilation_cache_dir)


def test_a_plan_is_a_function_of_its_seed():
    kinds = list(FAULTS)
    plan = planned(4, 2 * len(kinds), kinds)
    assert plan == planned(4, 2 * len(kinds), kinds) != planned(5, 2 * len(kinds), kinds)
    # A longer campaign begins as a shorter one, so that it goes on with it.
    assert plan[:7] == planned(4, 7, kinds)
    orders = [[at.kind for at in plan[i : i + len(kinds)]] for i in (0, len(kinds))]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(kinds) and orders[0] != orders[1]
    assert {at.after for at in planned(0, 300, kinds)} == set(range(1, 15))
    assert len({at.moment for at in plan}) == len(plan)
    assert plan[3].rng().random() == plan[3].rng().random()


def test_a_bucket_has_faults_of_its_own():
    of_bucket, others = set(possible(bucket=True)), set(possible())
    assert of_bucket and others and not of_bucket & others


def test_shapes_are_planned_too():
    shapes = planned_shapes(1, 40)
    assert shapes == planned_shapes(1, 40) and shapes[:5] == planned_shapes(1, 5)
    for before, after in zip([Shape(), *shapes], shapes, strict=False):
        assert (before.processes, before.devices) != (after.processes, after.devices)
        assert before.resident_rows != after.resident_rows


def test_the_tables_of_a_report():
    record = {"fault": "a", "exit_status": 70, "lost_steps": 3, "in_flight": 1, "promise": 10}
    record |= {"down_seconds": 2.0, "recovered_seconds": 9.0}
    other = record | {"exit_status": None, "down_seconds": None, "lost_steps": 5}
    lines = table([record, other, record | {"fault": "b", "down_seconds": None}]).splitlines()
    assert lines[2:] == [
        "| a | 2 | 70, none | 5 | 1 | 10 | 2 s | 9 s |",
        "| b | 1 | 70 | 3 | 1 | 10 | no | 9 s |",
    ]
    account = dict.fromkeys(PARTS, 0.0) | {"account": 10.0, "wall": 10.01, "computing": 4.0}
    assert time_table([account]).splitlines()[2] == "| 0 | 10.0 s | 10.0 s | 40.0% |"
    shape = {"processes": 2, "devices": 1, "resident_rows": None, "difference": 1e-7}
    assert reshape_table([shape]).splitlines()[2] == "| 2 x 1 | None | 1 | 1.0e-07 |"


def campaign(folder: Path, names: list[str], seed: int, disk: bool = False) -> list[dict]:
    """Rounds of these kinds, of which one is made after an interruption of the campaign itself."""
    assert set(names) <= set(possible())
    plan = planned(seed, len(names), names)
    with Campaign(folder, 5, cache(), disk, PATIENCE) as begun:
        begun.make(plan[:-1])
    with Campaign(folder, 5, cache(), disk, PATIENCE) as whole:
        assert [record["round"] for record in whole.records] == list(range(len(plan) - 1))
        records = whole.go(plan)
        for account in whole.accounts():
            assert account["account"] == pytest.approx(account["wall"], rel=0.01)
        whole.remove()
    assert sorted(record["fault"] for record in records) == sorted(names)
    return records


@pytest.mark.long
@pytest.mark.little_effort
def test_nothing_is_lost_by_faults(tmp_path):
    names = ["newest checkpoint torn", "kill -9 inside a save"]
    records = campaign(tmp_path, names, 5, disk=True)
    [torn] = [r for r in records if r["fault"] == names[0]]
    assert torn["lost_steps"] > 0 and torn["exit_status"] == 0
    assert all(record["lost_steps"] - record["in_flight"] <= 5 for record in records)
    notes = (tmp_path / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in notes] == records


@pytest.mark.long
@pytest.mark.nightly
def test_nothing_is_lost_by_a_full_disk(tmp_path):
    # Mounting a small one needs root.
    names = ["full disk" if os.geteuid() == 0 else "kill -9 of the coordinator"]
    campaign(tmp_path, [*names, "kill -9 of a process"], 5, disk=True)


@pytest.mark.long
@pytest.mark.nightly
def test_nothing_is_lost_when_the_shape_changes(tmp_path):
    with Reshaping(tmp_path, 2, 5, cache(), PATIENCE) as reshaping:
        [record] = reshaping.go([Shape(1, 4, None)])
    assert record["difference"] <= 1e-5
