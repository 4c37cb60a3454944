"""Ten groups of scored tokens by how often a run was trained on them."""

import math

import numpy as np
import pytest

from stem_jax.data.trained_pairs import PairCounts
from stem_jax.evaluation.frequency import FrequencySums, frequency_groups, frequency_lines


def test_groups_have_equal_tokens_the_rarest_first():
    # Trained on 7, 0, 3 and 100 times; the second id of 30 tokens fills three groups.
    groups = frequency_groups(
        np.array([7, 0, 3, 100]),
        np.array([10.0, 60.0, 20.0, 25.0]),
        np.array([10, 30, 10, 50]),
        np.array([20, 30, 40, 0]),
    )
    ends = [(g["least"], g["most"]) for g in groups]
    assert ends == [(0, 0)] * 3 + [(3, 3), (7, 7)] + [(100, 100)] * 5
    assert [g["tokens"] for g in groups] == [10] * 10
    losses = [2, 2, 2, 2, 1, *[0.5] * 5]
    assert [g["loss"] for g in groups] == pytest.approx(losses)
    assert groups[3]["bits_per_byte"] == pytest.approx(20 / math.log(2) / 40)
    assert groups[-1]["bits_per_byte"] is None


def test_ids_that_were_trained_on_equally_often_are_not_told_apart():
    """A group between them has a share of both, whatever the order of their ids."""
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        sums = np.array([[5, 5, 9], [4.0, 0.0, 16.0], [5, 15, 5], [5, 15, 5]])[:, order]
        groups = frequency_groups(*sums)
        # 20 tokens of 4 nats in groups of 2 and 3; then 5 of 16.
        sizes = [g["tokens"] for g in groups]
        assert sizes == [2, 3] * 5
        assert [g["loss"] for g in groups[:8]] == pytest.approx([4 / 20] * 8)
        assert groups[-1]["loss"] == pytest.approx(16 / 5)
        assert (groups[7]["least"], groups[8]["least"]) == (5, 9)


def test_fewer_than_ten_tokens_leave_groups_without_any():
    groups = frequency_groups(np.array([1, 2]), np.ones(2), np.array([3, 0]), np.ones(2))
    assert sum(g["tokens"] for g in groups) == 3
    assert groups[0] == dict.fromkeys(("least", "most", "loss", "bits_per_byte")) | {
        "tokens": 0,
        "bytes": 0,
    }


def test_sums_go_to_the_input_and_to_the_target():
    sums = FrequencySums(PairCounts(np.array([0, 1, 2]), np.array([2, 1, 0])))
    sums.add([[0, 1, 2], [2, 2]], [np.array([1.0, 2.0]), np.array([4.0])], [[3, 0], [5]])
    record = sums.record()
    # One of three tokens each; as the input 0 and 1 come first, as the target the two of 2.
    by_input, by_target = ([g for g in record[s] if g["tokens"]] for s in ("input", "target"))
    assert [(g["least"], g["loss"], g["bytes"]) for g in by_input] == [
        (0, 1.0, 3),
        (1, 2.0, 0),
        (2, 4.0, 5),
    ]
    assert [(g["least"], g["loss"], g["bytes"]) for g in by_target] == [
        (0, 3.0, 2.5),
        (0, 3.0, 2.5),
        (1, 1.0, 3),
    ]
    lines = frequency_lines("text", record)
    assert len(lines) == 12 and lines[0].startswith("text: tenths") and "-" in lines[2]
