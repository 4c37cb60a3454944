"""Curves, spikes and spread of gradient norms, from what a run logged."""

import json

import pytest

from stem_jax.study.curve import curve_of, stability_of


@pytest.fixture
def logged(tmp_path):
    """logged(losses, norms, dev): a work folder; None is what was not finite."""

    def write(losses, norms=None, dev=()):
        records = [
            {"step": step, "train/loss": loss, "train/grad_norm": 1.0 if norms is None else norm}
            for step, (loss, norm) in enumerate(zip(losses, norms or losses, strict=True), start=1)
        ]
        records += [{"step": step, "eval/loss": 1.0, "eval/bits_per_byte": b} for step, b in dev]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / "metrics.jsonl").write_text(text)
        return tmp_path

    return write


def test_a_long_curve_is_thinned_to_means(logged):
    losses = [float(n) for n in range(1, 976)]
    losses[3] = None
    losses[6:9] = [None] * 3
    curve = curve_of(logged(losses, dev=[(500, 2.5), (975, 2.25)]), 10)
    # Of 975 steps three are one point.
    assert len(curve["loss"]) == len(curve["tokens"]) == 325
    assert curve["loss"][:4] == [2.0, 5.5, None, 11.0]
    assert curve["tokens"][:2] == [30, 60] and curve["tokens"][-1] == 9750
    assert (curve["dev_tokens"], curve["dev_bits_per_byte"]) == ([5000, 9750], [2.5, 2.25])


@pytest.mark.parametrize(("steps", "points"), [(0, 0), (7, 7), (400, 400), (401, 201)])
def test_a_short_one_is_left_as_it_is(logged, steps, points):
    assert len(curve_of(logged([1.0] * steps), 1)["loss"]) == points


def test_spikes_stand_out_of_fifty_losses_by_six_deviations(logged):
    # Medians of 50 losses that alternate are 2.0, deviations 0.5: a spike is above 5.
    calm = [1.5, 2.5] * 25
    for losses, spikes in (
        ([*calm, 5.0], 0),
        ([*calm, 5.01], 1),
        # Too early, and not above.
        ([*calm[:-1], 9.0], 0),
        ([*calm, -9.0], 0),
        # Nothing follows the first ones but the trend.
        ([*calm, 9.0, *calm, 9.0], 2),
        ([*calm, None, 9.0], 2),
        # What was long ago does not count.
        ([*[9.0] * 60, *calm, 5.01], 1),
    ):
        assert stability_of(logged(losses), 0)["spikes"] == spikes


def test_the_spread_is_of_the_steps_behind_the_warm_up(logged):
    norms = [50.0] * 10 + [float(n) for n in range(100, 201)]
    norms.insert(12, None)
    measures = stability_of(logged([1.0] * len(norms), norms), 10)
    assert measures == {"spikes": 0, "gradient_norm_spread": 195 / 150}
    assert stability_of(logged([1.0] * 3, [None] * 3), 0) == {"spikes": 0}
