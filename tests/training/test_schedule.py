"""Learning rates past the end of a schedule, and schedules that a run may not begin with."""

import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stem_jax.config import Config
from stem_jax.config_file import config_from_json
from stem_jax.errors import InputError
from stem_jax.run_checks import check_first_start
from stem_jax.training.past_updates import PastUpdates
from stem_jax.training.resume import check_resumable
from stem_jax.training.schedule import ENDING, learning_rates, multiplier

PEAK = 1e-3


@pytest.fixture(scope="module")
def config_of(tiny_config):
    """config_of(schedule, length, **optimizer keys): of a run of three times the length."""

    def make(schedule: str, length: int | None = 100, steps: int = 300, **keys) -> Config:
        keys = {"schedule": schedule, "schedule_steps": length, "warmup_steps": 10, **keys}
        return tiny_config(
            **{"train.steps": steps, "optimizer.learning_rate": PEAK},
            **{f"optimizer.{key}": value for key, value in keys.items()},
        )

    return make


@given(
    schedule=st.sampled_from(["constant", "linear", "inv_sqrt", "cosine", "wsd"]),
    length=st.integers(2, 200),
    warmup=st.floats(0, 0.99),
    low=st.floats(0.01, 1),
    cycle=st.sampled_from([1.0, 0.5, 1 / 3, 0.25, 0.4, 0.7, 1.5, 2.0]),
    theta=st.sampled_from([0.5, 1.0, 1.5, 3.0]),
    decay=st.floats(0.05, 0.95),
)
def test_the_rate_never_rises_at_the_end_or_after_it(
    schedule, length, warmup, low, cycle, theta, decay, config_of
):
    assume(int(length * cycle) >= 1)
    config = config_of(
        schedule,
        length,
        # Of length 1 at least for inv_sqrt, which is refused without.
        warmup_steps=max(int(length * warmup), int(schedule == "inv_sqrt")),
        min_lr_ratio=low,
        cycle_length=cycle,
        cosine_theta=theta,
        decay_fraction=decay,
    )
    optimizer = config.optimizer
    rates = learning_rates(config, 3 * length)
    published = np.float32([multiplier(optimizer, length, step) for step in range(length)])
    np.testing.assert_array_equal(rates[:length], published * np.float32(PEAK))
    assert np.all(np.diff(rates[length - 1 :]) <= 0)
    if schedule not in ENDING:
        # They go on as if there were no end.
        far = [multiplier(optimizer, 10 * length, step) for step in range(3 * length)]
        np.testing.assert_allclose(rates, np.array(far) * PEAK, rtol=1e-6)
        return
    np.testing.assert_allclose(rates[length:], low * PEAK, rtol=1e-6)
    last_cycle_ends_here = {
        "linear": True,
        "cosine": (1 / cycle).is_integer(),
        # In whole updates; and a decay that takes one at least.
        "wsd": length % int(length * cycle) == 0 and int(length * decay) >= 1,
    }
    if last_cycle_ends_here[schedule]:
        just_before = multiplier(optimizer, length, length - 1e-6)
        assert just_before == pytest.approx(low, abs=1e-3)


@pytest.mark.parametrize("schedule", ENDING)
def test_a_schedule_ends_at_its_minimum(schedule, config_of):
    """The formulas go back to the peak: a cosine for one update, wsd for a cycle."""
    rates = learning_rates(config_of(schedule, min_lr_ratio=0.1), 300) / PEAK
    np.testing.assert_allclose(rates[100:], 0.1, rtol=1e-6)
    formula = multiplier(config_of(schedule).optimizer, 100, 100)
    assert formula == pytest.approx(1.0 if schedule == "cosine" else 0.1)


def test_inverse_square_root_goes_on_falling(config_of):
    rates = learning_rates(config_of("inv_sqrt", min_lr_ratio=0.0), 300) / PEAK
    np.testing.assert_allclose(rates[10:], np.sqrt(10 / np.arange(10, 300)), rtol=1e-6)


def test_updates_made_before_schedules_ended_keep_their_rates(config_of):
    """Rows that lag behind look back on them; what follows stays at the minimum."""
    config = config_of("wsd")
    rates = learning_rates(config, 300, PastUpdates(150))
    formula = [multiplier(config.optimizer, 100, step) for step in range(150)]
    np.testing.assert_allclose(rates[:150], np.array(formula) * PEAK, rtol=1e-6)
    assert rates[140] == pytest.approx(PEAK)
    np.testing.assert_allclose(rates[150:], 0.1 * PEAK, rtol=1e-6)
    # Within its schedule a run has no other rates for it.
    within = learning_rates(config, 100)
    np.testing.assert_array_equal(learning_rates(config, 100, PastUpdates(70)), within)


def test_a_resume_compares_the_rates_that_were(config_of):
    """Of 120 updates that a run made, 20 past the end of a schedule without one."""
    saved = config_of("wsd", 100)
    longer = config_of("wsd", 100, steps=500)
    check_resumable(saved, longer, 120, PastUpdates(120))
    other = config_of("wsd", 100, min_lr_ratio=0.2)
    with pytest.raises(InputError, match=r"min_lr_ratio changed the learning rates of the 120 "):
        check_resumable(saved, other, 120, PastUpdates(120))
    # One that ends later has other rates already.
    with pytest.raises(InputError, match=r"schedule_steps changed the learning rates of the 120 "):
        check_resumable(saved, config_of("wsd", 200), 120)


REFUSED = [
    (
        {"schedule": "inv_sqrt", "warmup_steps": 0},
        "optimizer.warmup_steps=0 with optimizer.schedule=inv_sqrt: ",
        {"warmup_steps": 1},
    ),
    (
        {"schedule": "linear", "min_lr_ratio": 1.5},
        "optimizer.min_lr_ratio=1.5 is more than the peak",
        {"min_lr_ratio": 1.0},
    ),
    (
        {"schedule": "wsd", "warmup_steps": 100},
        "optimizer.warmup_steps=100 is no less than optimizer.schedule_steps=100, and "
        "train.steps=300 goes on",
        {"warmup_steps": 99},
    ),
]


@pytest.mark.parametrize(("keys", "message", "remedy"), REFUSED)
def test_schedules_that_jump_are_refused_at_the_first_start_alone(keys, message, remedy, config_of):
    config = config_of(**keys)
    with pytest.raises(InputError, match=re.escape(message)):
        check_first_start(config)
    check_first_start(config_of(**{**keys, **remedy}))
    # It can be read all the same: runs of earlier versions have such configurations.
    assert config_from_json(config.to_json()) == config


def test_a_short_trial_may_end_within_its_warm_up(config_of):
    check_first_start(config_of("cosine", None, steps=5))
