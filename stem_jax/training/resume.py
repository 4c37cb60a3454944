"""Which changes of the configuration a run survives on resume, and when another continues it."""

import shlex
from pathlib import Path

import numpy as np

from stem_jax.config import MEMORY_SECTIONS, Config, differing_keys, keys_of
from stem_jax.config_keys import Role
from stem_jax.errors import InputError
from stem_jax.memory.catalogue import init_std
from stem_jax.memory.memory import STEM
from stem_jax.training.past_updates import NO_PAST, PastUpdates
from stem_jax.training.schedule import learning_rates

# A run that goes on may change these; those of the schedule while past learning rates stay.
_FREE = (Role.HARMLESS, Role.START)


def changed_keys(saved: Config, current: Config) -> list[str]:
    """Keys by which a run of `current` would be another than one of `saved`.

    A value is the same whether it is said or taken from another key; what is said of a memory that
    neither has is nothing.
    """
    return [key for key in differing_keys(saved, current) if not _is_same(saved, current, key)]


def _is_same(saved: Config, current: Config, key: str) -> bool:
    section, _, field = key.partition(".")
    if section == "lora" and not saved.lora.rank and not current.lora.rank:
        return True
    if section in MEMORY_SECTIONS:
        if not getattr(saved, section).layers and not getattr(current, section).layers:
            return True
        if field == "eos_id" and current.value_of(key) is None:
            # That of the tokenizer, which is asked for by itself.
            return True
    if key == "tables.trained_words" and isinstance(current.value_of(key), str):
        # Compared once the tokenizer says what its tokens are.
        return saved.value_of(key) is not None
    if field == "init_std":
        name = STEM if section == "tables" else section
        return init_std(saved, name) == init_std(current, name)
    return saved.resolved(key) == current.resolved(key)


def check_resumable(
    saved: Config, current: Config, updates: int, past: PastUpdates = NO_PAST
) -> None:
    """Raises InputError, naming the keys, if `current` cannot continue a run of `saved`.

    Args:
        saved: configuration in the checkpoint.
        current: configuration now.
        updates: optimizer updates that the checkpoint has behind it.
        past: see `schedule.learning_rates`.
    """
    changed = changed_keys(saved, current)
    refused = [key for key in changed if key not in keys_of(*_FREE, Role.SCHEDULE)]
    before, now = (learning_rates(config, updates, past) for config in (saved, current))
    of_rates = [key for key in changed if key in keys_of(Role.SCHEDULE)]
    same_rates = np.array_equal(before, now)
    # All of them at once: a shipped file may have changed in several.
    restored = refused + ([] if same_rates else of_rates)
    remedy = (
        f"to continue the run add {' '.join(flag_of(saved, key) for key in restored)}, or start in "
        "another --workdir"
    )
    if refused:
        listed = "; ".join(
            f"{key}: {saved.value_of(key)!r} -> {current.value_of(key)!r}" for key in refused
        )
        raise InputError(
            f"the checkpoint was trained with another configuration ({listed}); {remedy}"
        )
    if not same_rates:
        raise InputError(
            f"{', '.join(of_rates)} changed the learning rates of the {updates} updates already "
            f"made; {remedy}. To leave room for more steps later, set optimizer.schedule_steps at "
            "the start"
        )


def check_continuable(folder: Path, step: int, saved: Config, current: Config) -> None:
    """Raises InputError, naming the keys, if a run of `current` cannot continue another.

    Args:
        folder: of the other run.
        step: of its checkpoint.
        saved: configuration in it.
    """
    may_change = keys_of(*_FREE, Role.SCHEDULE, Role.CONTINUED)
    refused = [key for key in changed_keys(saved, current) if key not in may_change]
    if refused:
        listed = "; ".join(
            f"{key}: {saved.value_of(key)!r} -> {current.value_of(key)!r}" for key in refused
        )
        raise InputError(
            f"train.continue_from={folder} was trained with another configuration ({listed}), "
            "under which its optimizer state means something else; add "
            f"{' '.join(flag_of(saved, key) for key in refused)}, or begin with its weights alone "
            "by train.init_from"
        )
    if current.train.steps <= step:
        raise InputError(
            f"train.steps={current.train.steps} counts the {step} steps that train.continue_from="
            f"{folder} has behind it, too; set train.steps to more than {step}"
        )


def flag_of(config: Config, key: str) -> str:
    """The override that gives a key the value that it has here."""
    value = config.value_of(key)
    if isinstance(value, tuple):
        value = ",".join(map(str, value)) or "none"
    elif value is None or isinstance(value, bool):
        value = str(value).lower()
    return f"--config.{key}={shlex.quote(str(value))}"
