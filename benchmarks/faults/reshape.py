"""A run whose number of processes and resident rows change between starts.

After each start the losses of twenty steps are those of a run of the first shape that goes on
undisturbed from the same checkpoint, and at the end no step and no row was lost.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.run import STEP_TIMEOUT, Run, Shape
from benchmarks.faults.starts import kill
from benchmarks.saved_state import losses, saved_arrays

STEPS = 20
TOLERANCE = 1e-5
_SHAPES = [(1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)]
_ROWS = [None, 256, 192]


def planned_shapes(seed: int, rounds: int) -> list[Shape]:
    """The shape of each start after the first; none is that of the start before."""
    shapes = [Shape()]
    for number in range(rounds):
        rng = random.Random(f"{seed} shape {number}")
        others = [s for s in _SHAPES if s != (shapes[-1].processes, shapes[-1].devices)]
        rows = [r for r in _ROWS if r != shapes[-1].resident_rows]
        shapes.append(Shape(*rng.choice(others), rng.choice(rows)))
    return shapes[1:]


class Reshaping:
    """The rounds in a folder, where each is noted when it is over."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        every: int,
        cache: Path | None = None,
        step_timeout: int = STEP_TIMEOUT,
    ):
        self._folder, self._seed, self._every = folder, seed, every
        self._notes = folder / "reshaped.jsonl"
        self._cache = cache or folder / "compiled"
        self._timeout = step_timeout
        self.run = Run(folder / "reshaped", every, self._cache, False, step_timeout)
        lines = self._notes.read_text().splitlines() if self._notes.exists() else []
        self.records: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def __enter__(self) -> "Reshaping":
        return self

    def __exit__(self, *_) -> None:
        self.run.end_leftovers()

    def go(self, shapes: list[Shape], say=lambda text: None) -> list[dict[str, Any]]:
        """Raises AssertionError where a loss differs, or a step or a row is lost."""
        run = self.run
        run.end_leftovers()
        run.workdir.mkdir(exist_ok=True)
        if not run.last_step():
            # The first checkpoint, of the first shape.
            run.start()
            run.wait_for(self._every + 1)
            run.process(0).terminate()
            assert run.wait() == 0
        for number in range(len(self.records), len(shapes)):
            record = self._round(number, shapes[number])
            with self._notes.open("a") as notes:
                notes.write(json.dumps(record) + "\n")
            self.records.append(record)
            say(json.dumps(record))
        self._compare_rows()
        return self.records

    def _round(self, number: int, shape: Shape) -> dict[str, Any]:
        run, rng = self.run, random.Random(f"{self._seed} end {number}")
        begin = max(
            int(p.name) for p in (run.workdir / "checkpoints").glob("[0-9]*") if p.name.isdecimal()
        )
        folder = self._folder / "undisturbed"
        shutil.rmtree(folder, ignore_errors=True)
        calm = run.copy(folder)
        calm.start(begin + STEPS)
        assert calm.wait(None) == 0, f"see {calm.workdir}.log"
        run.shape = shape
        known = run.starts()
        run.start()
        restored = "resuming from step"
        run.wait_until(
            lambda: run.starts() > known and restored in run.newest_start(), "its restored state"
        )
        last = begin + STEPS + rng.randrange(1, self._every)
        run.wait_until(lambda: run.step_of_start() >= last, f"step {last}")
        told = rng.random() < 0.5
        if told:
            run.process(rng.randrange(shape.processes)).terminate()
            assert run.wait() == 0, f"see {run.workdir}.log"
        else:
            kill(run.processes())
            run.wait()
        assert run.resumed_from() == begin
        expected, found = losses(calm.workdir), losses(run.workdir)
        new = range(begin + 1, begin + STEPS + 1)
        difference = max(abs(found[step] - expected[step]) for step in new)
        assert difference <= TOLERANCE, f"{shape}: {difference} after step {begin}"
        return {
            "round": number,
            "processes": shape.processes,
            "devices": shape.devices,
            "resident_rows": shape.resident_rows,
            "began_after": begin,
            "ended_by": "SIGTERM" if told else "kill -9",
            "difference": difference,
        }

    def _compare_rows(self) -> None:
        """Every step was logged once, and every row had its last update when it should."""
        self.run.shape = Shape()
        self.run.start(steps := self.run.last_step() + 1)
        assert self.run.wait() == 0, f"see {self.run.workdir}.log"
        folder = self._folder / f"calm_{steps}"
        calm = Run(folder, self._every, self._cache, False, self._timeout)
        calm.end_leftovers()
        shutil.rmtree(folder, ignore_errors=True)
        calm.workdir.mkdir()
        calm.start(steps)
        assert calm.wait(None) == 0, f"see {calm.workdir}.log"
        assert list(losses(self.run.workdir)) == list(range(1, steps + 1))
        expected, found = (saved_arrays(each.workdir, steps) for each in (calm, self.run))
        rows = [name for name in expected if "last_step" in name]
        assert rows
        for name in rows:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
