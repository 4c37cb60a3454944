"""A train step on batches of real text that is called again and again, to be timed."""

import itertools
from pathlib import Path

import jax

from stem_jax.config import Config
from stem_jax.memory.catalogue import with_eos
from stem_jax.mesh import make_mesh
from stem_jax.training.run_data import open_run_data
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import init_state
from stem_jax.training.step import TrainStep

# So many batches take turns.
_BATCHES = 8


class TimedStep:
    """A train step that keeps its state; calling it makes one update and waits for it."""

    def __init__(self, config: Config, workdir: Path):
        """config: whose sources are a prepared store. workdir: for its tokenizer."""
        data = open_run_data(config, workdir)
        self.config = config = with_eos(config, data.tokenizer.special.eos_id)
        self._programs = TrainStep(config, make_mesh(config.mesh, jax.devices()[:1]))
        self._state = init_state(self._programs.blueprint)
        self._schedule = make_schedule(config, config.train.steps + 1)
        batches = [self._programs.place(data.batches.batch(n)) for n in range(_BATCHES)]
        reads = self._programs.reads
        demands = [self._programs.demand(b) if reads.memories else {} for b in batches]
        sizes = [reads.sizes_for(b, d) for b, d in zip(batches, demands, strict=True)]
        self._turns = itertools.cycle(zip(batches, sizes, strict=True))
        # Every size is compiled before anything is timed.
        for _ in range(_BATCHES):
            self()

    def __call__(self) -> None:
        batch, sizes = next(self._turns)
        self._state, metrics = self._programs.update(
            self._state, batch, self._schedule, sizes=sizes
        )
        jax.block_until_ready((self._state, metrics))

    @property
    def state_bytes(self) -> int:
        """Of parameters, rows and all moments."""
        return sum(array.nbytes for array in jax.tree.leaves(self._state))
