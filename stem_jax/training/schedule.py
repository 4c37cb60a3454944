"""The five published learning-rate schedules, as the official code computes them, with an end.

A schedule is a table of numbers, one per update, so the row optimizer can look back over the
updates that a row missed.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from stem_jax.config import Config, OptimizerConfig
from stem_jax.memory.catalogue import table_specs
from stem_jax.mesh import replicated
from stem_jax.tables.update_history import UpdateHistory, make_history
from stem_jax.training.past_updates import NO_PAST, PastUpdates

# Those that come to their minimum at the end; the others go on as they are.
ENDING = ("linear", "cosine", "wsd")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rates of every update of a run: [T] float32, and what rows look back with.

    tables: of each memory.
    """

    rates: jax.Array | np.ndarray
    tables: dict[str, UpdateHistory]


def make_schedule(
    config: Config,
    updates: int,
    rates: np.ndarray | None = None,
    past: PastUpdates = NO_PAST,
    mesh: Mesh | None = None,
) -> Schedule:
    """The schedule of the first `updates` updates.

    Args:
        rates: [updates] in place of the configured ones.
        past: see `learning_rates`.
        mesh: whose devices all hold it; a schedule that lies elsewhere would travel to each of
            them, some 4 MB in a long run, whenever a step is called with it. None: the first one.
    """
    if rates is None:
        rates = learning_rates(config, updates, past)
    rates = np.asarray(rates, np.float32)
    histories = {name: make_history(spec, rates) for name, spec in table_specs(config).items()}
    schedule = Schedule(rates, histories)
    if mesh is None:
        return jax.tree.map(jnp.asarray, schedule)
    return jax.device_put(schedule, replicated(mesh))


def learning_rates(config: Config, updates: int, past: PastUpdates = NO_PAST) -> np.ndarray:
    """Learning rates of updates 1..`updates` of a run, float32 [updates].

    The first update of a warm-up has rate 0, as in the official code. That code leaves open what
    follows a schedule (a cosine returns to its peak for an update, wsd for whole cycles); here the
    rate stays at the minimum that linear, cosine and wsd have come to, and inv_sqrt goes on
    falling.

    Args:
        past: rows that lag behind must look back on the rates that were. What comes is where the
            configuration's schedule is after so many updates.
    """
    found = [_rates(of_part, part, past.endless) for part, of_part in past.configs(config, updates)]
    return np.concatenate(found)


def _rates(config: Config, updates: range, endless: int) -> np.ndarray:
    optimizer = config.optimizer
    steps = schedule_length(config)
    ratios = [
        optimizer.min_lr_ratio
        if step >= max(steps, endless) and optimizer.schedule in ENDING
        else multiplier(optimizer, steps, step)
        for step in updates
    ]
    return np.asarray(ratios, np.float64).astype(np.float32) * np.float32(optimizer.learning_rate)


def schedule_length(config: Config) -> int:
    """Updates from the first of the warm-up to the end of the schedule."""
    return config.optimizer.schedule_steps or config.train.steps


def multiplier(optimizer: OptimizerConfig, steps: int, step: int) -> float:
    """Share of the peak learning rate at `step` (0-based) of a schedule of `steps`."""
    if optimizer.schedule == "constant":
        return 1.0
    if step < optimizer.warmup_steps:
        return step / optimizer.warmup_steps
    if optimizer.schedule == "inv_sqrt":
        decayed = (optimizer.warmup_steps / step) ** optimizer.inv_sqrt_exponent if step else 1.0
        return max(decayed, optimizer.min_lr_ratio)
    if optimizer.schedule == "wsd":
        return _wsd(optimizer, steps, step)
    if step > steps:
        return optimizer.min_lr_ratio
    progress = (step - optimizer.warmup_steps) / max(steps - optimizer.warmup_steps, 1)
    low = optimizer.min_lr_ratio
    if optimizer.schedule == "linear":
        return progress * low + (1 - progress)
    # Odd cycles of the cosine run upwards.
    sign = -1 if step // (steps * optimizer.cycle_length) % 2 else 1
    angle = math.pi * progress**optimizer.cosine_theta / optimizer.cycle_length
    return low + 0.5 * (1 - low) * (sign * math.cos(angle) + 1)


def _wsd(optimizer: OptimizerConfig, steps: int, step: int) -> float:
    """Warm-up, stable, decay; the decay interpolates the inverse rate linearly."""
    cycle = int(steps * optimizer.cycle_length)
    # The step after the last ends the last cycle and begins no other.
    end = steps if step == steps else cycle * (step // cycle + 1)
    decay_steps = int(end * optimizer.decay_fraction)
    if step <= end - decay_steps:
        return 1.0
    progress = (step - (end - decay_steps)) / decay_steps
    return 1 / (progress / optimizer.min_lr_ratio + (1 - progress))
