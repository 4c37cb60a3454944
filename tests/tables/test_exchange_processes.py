"""Sixteen devices, in one process and in four, train as one device does."""

import contextlib
import json
from pathlib import Path

import pytest

from tests import launching
from tests.children import finish, gang, train_flags

pytestmark = pytest.mark.little_effort
STEPS = 20
# 768 rows over sixteen owners, asked in two hops of four.
SMALL = launching.SMALL | {
    "train.steps": STEPS,
    "train.global_batch_size": 16,
    "train.log_every": 1,
    "tables.pad_multiple": 256,
    "train.sample_prompt": "",
}
TWO_HOPS = "from stem_jax.tables import hops\nhops.MOST_PEERS = 4"


def _losses(workdir: Path, processes: int, devices: int) -> list[float]:
    argv = train_flags("tiny", workdir, SMALL, {"mesh__fsdp": 4 if devices * processes > 1 else 1})
    commands = [argv] * processes
    with contextlib.ExitStack() as stack:
        members = gang("stem_jax.train", *commands, changes=TWO_HOPS, devices=devices)
        for process in [stack.enter_context(member) for member in members]:
            finish(process)
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [record["train/loss"] for record in records if "train/loss" in record]


@pytest.mark.long
def test_sixteen_devices_train_as_one(tmp_path):
    alone = _losses(tmp_path / "one", 1, 1)
    together = _losses(tmp_path / "sixteen", 1, 16)
    apart = _losses(tmp_path / "four", 4, 4)
    assert len(alone) == len(together) == len(apart) == STEPS and alone[-1] < alone[0]
    assert together == pytest.approx(alone, rel=0, abs=1e-5)
    assert apart == pytest.approx(alone, rel=0, abs=1e-5)
    assert apart == pytest.approx(together, rel=0, abs=1e-6)
