"""A campaign: a run goes through all faults of a plan, and ends as if nothing had happened."""

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.damage import remove_disk, small_disk
from benchmarks.faults.kinds import FAULTS
from benchmarks.faults.plan import Round
from benchmarks.faults.run import STEP_TIMEOUT, Run, copy_of
from benchmarks.faults.starts import terminate
from benchmarks.saved_state import losses, saved_arrays
from stem_jax.goodput.start_record import read_starts
from stem_jax.goodput.totals import Totals
from tests.buckets import Bucket

# An account may miss so much of the time that the processes took, by the kernel's clocks.
_SHARE = 0.01
# The undisturbed run saves so seldom, and whole tables.
_CALM_EVERY = 500
Record = dict[str, Any]


class Campaign:
    """The rounds of a plan in a folder, where each is noted when it is over."""

    def __init__(
        self,
        folder: Path,
        every: int,
        cache: Path | None = None,
        disk: bool = False,
        step_timeout: int = STEP_TIMEOUT,
        bucket: Bucket | None = None,
    ):
        """Args:
        every: steps between checkpoints.
        cache: of compiled programs; None: one in the folder.
        disk: most rows of the run are on disk.
        step_timeout: of the run, in seconds.
        bucket: that the run's folder is in, of a store that this process finds.
        """
        self._folder = folder
        self._notes = folder / "rounds.jsonl"
        self._first = folder / "first_start.json"
        self._cache = cache or folder / "compiled"
        self._every, self._on_disk = every, disk
        self._timeout = step_timeout
        workdir = folder / "disturbed"
        if bucket is not None:
            workdir = copy_of(bucket, folder / "copies", "disturbed", 0)
        self.run = Run(workdir, every, self._cache, disk, step_timeout, bucket=bucket)
        lines = self._notes.read_text().splitlines() if self._notes.exists() else []
        self.records: list[Record] = [json.loads(line) for line in lines]

    def __enter__(self) -> "Campaign":
        return self

    def __exit__(self, *_) -> None:
        self.run.end_leftovers()

    def go(self, plan: Sequence[Round], say=lambda text: None) -> list[Record]:
        """Makes the rounds that were not made yet, and compares the end with an undisturbed run.

        Returns a record of each round. Raises AssertionError where more was lost than promised,
        the two ends differ, or the time of a process is not that of its account.
        """
        self.make(plan, say)
        terminate(self.run, plan[-1], plan[-1].rng())
        self._compare()
        return self.records

    def make(self, plan: Sequence[Round], say=lambda text: None) -> None:
        """Makes the rounds alone; the run goes on."""
        run = self.run
        run.end_leftovers()
        if any(at.kind == "full disk" for at in plan):
            small_disk(run.workdir, self._on_disk)
        else:
            run.workdir.mkdir(parents=True, exist_ok=True)
        known = run.starts()
        run.start()
        if not self._first.exists():
            born = [process.create_time() for process in run.processes()]
            self._first.write_text(json.dumps(born))
        run.wait_until(lambda: run.starts() > known, "its start")
        # Two checkpoints, so that one of them may be damaged.
        run.wait_for(max(2 * self._every, run.last_step()) + 1)
        for at in plan[len(self.records) :]:
            say(str(at))
            record = self._round(at)
            with self._notes.open("a") as notes:
                notes.write(json.dumps(record) + "\n")
            self.records.append(record)
            say(json.dumps(record))

    def remove(self) -> None:
        """What the machine has of it beside the folder."""
        remove_disk(self.run.workdir)

    def accounts(self) -> list[dict[str, float]]:
        """Of each process: seconds by its account, and by the kernel's clocks; `other`'s share."""
        born = json.loads(self._first.read_text())
        found = []
        for process, began in enumerate(born):
            path = self.run.account(process)
            totals = Totals.of(read_starts(path))
            wall = path.stat().st_mtime - began
            other = totals.parts["other"] / totals.seconds
            found.append({"account": totals.seconds, "wall": wall, "other": other, **totals.parts})
        return found

    def _round(self, at: Round) -> Record:
        run, fault = self.run, FAULTS[at.kind]
        run.wait_for(run.last_step() + at.after)
        began = time.monotonic()
        status = fault.strike(run, at, at.rng())
        down, goes_on = time.monotonic() - began, run.ended is None
        reached, saving = run.last_step(), run.unfinished_saves()
        if not goes_on:
            known = run.starts()
            run.start()
            run.wait_until(lambda: run.starts() > known, "its start")
        run.wait_for(reached + 1)
        resumed = reached if goes_on else run.resumed_from()
        # Steps beside a save that the fault found on its way to the disk.
        in_flight = reached - min(saving) if saving and fault.intervals else 0
        record = {
            "round": at.number,
            "fault": at.kind,
            "step": reached,
            "exit_status": status,
            "lost_steps": reached - resumed,
            "in_flight": in_flight,
            "promise": fault.intervals * self._every,
            "down_seconds": None if goes_on else round(down, 1),
            "recovered_seconds": round(time.monotonic() - began, 1),
        }
        assert record["lost_steps"] - in_flight <= record["promise"], record
        return record

    def _compare(self) -> None:
        run, steps = self.run, self.run.last_step()
        folder = self._folder / f"calm_{steps}"
        calm = Run(folder, _CALM_EVERY, self._cache, self._on_disk, self._timeout, full_every=1)
        calm.end_leftovers()
        shutil.rmtree(folder, ignore_errors=True)
        calm.workdir.mkdir()
        calm.start(steps)
        with contextlib.ExitStack() as stack:
            stack.callback(calm.end_leftovers)
            assert calm.wait(None) == 0, f"see {calm.workdir}.log"
        expected, found = (saved_arrays(each.workdir, steps) for each in (calm, run))
        assert expected.keys() == found.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)
        logged = losses(run.workdir)
        assert list(logged) == list(range(1, steps + 1))
        assert logged == losses(calm.workdir)
        for process, account in enumerate(self.accounts()):
            missed = abs(account["account"] / account["wall"] - 1)
            assert missed <= _SHARE, f"process {process}: {account}"
