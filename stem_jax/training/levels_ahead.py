"""Steps of larger sizes compile on a thread while training goes on, before a batch needs them.

Sizes come in a few levels, see `block_sizes`, each a program of its own. The run starts when the
first is ready. On TPUs, where a step leaves the host's cores idle and takes minutes to compile, the
others follow at once, one after another. Elsewhere compiling takes from the step: a CPU's cores
are those of the step, and for GPUs some kernels are tried out on the device. There a level is
compiled when a batch nearly needs it, and in no run of few steps.
"""

import concurrent.futures

import jax

from stem_jax import background
from stem_jax.training.look_ahead import Ready
from stem_jax.training.reads import ReadSizes
from stem_jax.training.schedule import Schedule
from stem_jax.training.state import TrainState
from stem_jax.training.step import TrainStep

# Before that what is saved is little, and tests and first tries are over.
_FIRST_STEPS = 100


class LevelsAhead:
    """Looks at each step of a training, and compiles what a later one will need."""

    def __init__(self, programs: TrainStep):
        self._programs = programs
        self._near = programs.mesh.devices.flat[0].platform != "tpu"
        self._steps = 0
        # What was dispatched, or begun to compile; the levels whose turn has not come.
        self._known: set[ReadSizes] = set()
        self._waiting: list[ReadSizes] = []
        self._compiling: tuple[ReadSizes, concurrent.futures.Future] | None = None

    def await_step(self, ready: Ready) -> None:
        """Waits if the step of this batch is being compiled: nobody compiles it again."""
        if self._compiling is not None and self._compiling[0] == ready.sizes:
            # If it failed, the step will compile, and say why.
            self._compiling[1].exception()

    def after_step(self, state: TrainState, ready: Ready, schedule: Schedule) -> None:
        """Begins to compile what comes next, once the step of this batch was dispatched.

        Args:
            state, schedule: of the next step, from which others differ in their sizes alone.
        """
        if not ready.demand or ready.sizes is None:
            return
        self._steps += 1
        self._known.add(ready.sizes)
        # The first steps also compile what else a training needs.
        if self._steps > (_FIRST_STEPS if self._near else 1):
            self._waiting += [
                sizes
                for sizes in self._programs.reads.larger_sizes(
                    ready.batch, ready.demand, ready.sizes, near=self._near
                )
                if sizes not in self._known
            ]
            self._known.update(self._waiting)
        if not self._waiting or (self._compiling is not None and not self._compiling[1].done()):
            return
        sizes = self._waiting.pop(0)
        # Arrays would be kept as long as that takes.
        arrays = (state, ready.batch, schedule, ready.slots)
        of_state, batch, of_schedule, slots = jax.tree.map(_described, arrays)
        result = background.begin(
            lambda: self._programs.compile_update(of_state, batch, of_schedule, slots, sizes),
            "levels-ahead",
        )
        self._compiling = (sizes, result)


def _described(array: jax.Array) -> jax.ShapeDtypeStruct:
    # A sharding that nobody asked for is none to a program.
    sharding = array.sharding if array.committed else None
    weak = array.aval.weak_type
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding, weak_type=weak)
