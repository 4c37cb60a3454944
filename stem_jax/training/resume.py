"""Which changes of the configuration a run survives on resume, and when another continues it."""

import dataclasses
import shlex
from pathlib import Path

import numpy as np

from stem_jax.config import Config
from stem_jax.errors import InputError
from stem_jax.training.past_updates import NO_PAST, PastUpdates
from stem_jax.training.schedule import learning_rates

# These change where and how the same run computes, or what it reports; not what it computes.
_HARMLESS = frozenset(
    """
    model.attention model.remat model.scan_layers tables.vocab_axes tables.capacity
    tables.resident_rows tables.prefetch tables.cache_policy data.folder
    mesh.data mesh.fsdp mesh.tensor mesh.max_replicated_mib
    train.micro_batches train.loss_chunk train.max_bad_steps train.log_every
    train.init_from train.continue_from train.step_timeout train.compilation_cache
    train.profile_steps train.sample_prompt train.sample_tokens
    eval.every eval.max_batches eval.baselines checkpoint.every checkpoint.keep
    """.split()
)
# These are harmless as long as the updates made so far had the same learning rates.
_SCHEDULE = frozenset(
    """
    train.steps optimizer.learning_rate optimizer.schedule optimizer.schedule_steps
    optimizer.warmup_steps optimizer.min_lr_ratio optimizer.decay_fraction optimizer.cycle_length
    optimizer.cosine_theta optimizer.inv_sqrt_exponent
    """.split()
)
# Beyond those, a run that continues another may change what it trains on, in which precision and
# under which limits; not what the moments and the rows that lag behind are meant for.
_CONTINUING = (
    _HARMLESS
    | _SCHEDULE
    | frozenset(
        """
        model.rope_theta model.rope_scaling model.rope_factor model.rope_original_len
        model.init_std_factor model.init_base_std tables.init_std
        model.param_dtype model.compute_dtype model.matmul_dtype
        data.sources data.tokenizer data.tokenizer_path data.text_field data.format
        data.validation_fraction train.seed train.seq_len train.global_batch_size train.z_loss
        optimizer.clip_norm tables.clip_norm
        """.split()
    )
)


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
    changed = differing_keys(saved, current)
    refused = [key for key in changed if key not in _HARMLESS | _SCHEDULE]
    before, now = (learning_rates(config, updates, past) for config in (saved, current))
    of_rates = [key for key in changed if key in _SCHEDULE]
    same_rates = np.array_equal(before, now)
    # All of them at once: a shipped file may have changed in several.
    restored = refused + ([] if same_rates else of_rates)
    remedy = (
        f"to continue the run add {' '.join(_flag(saved, key) for key in restored)}, or start in "
        "another --workdir"
    )
    if refused:
        listed = "; ".join(
            f"{key}: {_get(saved, key)!r} -> {_get(current, key)!r}" for key in refused
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
    refused = [key for key in differing_keys(saved, current) if key not in _CONTINUING]
    if refused:
        listed = "; ".join(
            f"{key}: {_get(saved, key)!r} -> {_get(current, key)!r}" for key in refused
        )
        raise InputError(
            f"train.continue_from={folder} was trained with another configuration ({listed}), "
            "under which its optimizer state means something else; add "
            f"{' '.join(_flag(saved, key) for key in refused)}, or begin with its weights alone "
            "by train.init_from"
        )
    if current.train.steps <= step:
        raise InputError(
            f"train.steps={current.train.steps} counts the {step} steps that train.continue_from="
            f"{folder} has behind it, too; set train.steps to more than {step}"
        )


def differing_keys(saved: Config, current: Config) -> list[str]:
    """Keys "section.name" whose values differ."""
    return [
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(Config)
        for field in dataclasses.fields(getattr(saved, section.name))
        if _get(saved, f"{section.name}.{field.name}")
        != _get(current, f"{section.name}.{field.name}")
    ]


def _flag(config: Config, key: str) -> str:
    """The override that gives a key the value that it has here."""
    value = _get(config, key)
    if isinstance(value, tuple):
        value = ",".join(map(str, value)) or "none"
    elif value is None or isinstance(value, bool):
        value = str(value).lower()
    return f"--config.{key}={shlex.quote(str(value))}"


def _get(config: Config, key: str):
    section, name = key.split(".")
    return getattr(getattr(config, section), name)
