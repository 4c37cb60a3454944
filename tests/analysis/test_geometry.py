"""Angles, ranks and norms of vectors whose geometry is known."""

import numpy as np
import pytest

from stem_jax.analysis.geometry import (
    HISTOGRAM_BINS,
    LayerGeometry,
    Spread,
    effective_rank,
    norms_by_frequency,
    random_mean_abs_cosine,
    spread_verdict,
)

RNG = np.random.default_rng(0)


def normal(n, width, seed=0):
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


def layer(vectors, number=0):
    return LayerGeometry.of(number, vectors, np.full(len(vectors), 20))


def test_angles_are_those_of_every_pair():
    vectors = normal(30, 7)
    found = Spread.of(vectors)
    cosines = [
        float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        for i, a in enumerate(vectors)
        for b in vectors[:i]
    ]
    assert found.mean_abs_cosine == pytest.approx(np.mean(np.abs(cosines)), rel=1e-5)
    assert found.mean_cosine == pytest.approx(np.mean(cosines), abs=1e-6)
    counts, _ = np.histogram(cosines, HISTOGRAM_BINS, (-1, 1))
    np.testing.assert_allclose(found.histogram, counts / len(cosines), atol=1e-12)
    # Length does not matter, and a vector without a direction has no angle.
    longer = np.concatenate([vectors * RNG.uniform(0.1, 9, (30, 1)), np.zeros((1, 7))])
    assert Spread.of(longer).mean_abs_cosine == pytest.approx(found.mean_abs_cosine, rel=1e-5)
    assert Spread.of(np.zeros((5, 7))) is None


def test_the_standard_error_is_that_of_other_samples():
    means = [Spread.of(normal(60, 5, seed)).mean_abs_cosine for seed in range(200)]
    said = np.mean([Spread.of(normal(60, 5, seed)).standard_error for seed in range(20)])
    assert said == pytest.approx(np.std(means), rel=0.35)
    assert np.mean(means) == pytest.approx(random_mean_abs_cosine(5), rel=0.01)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_effective_rank_is_that_of_singular_values(shape):
    vectors = normal(*shape)
    singular = np.linalg.svd(vectors.astype(np.float64), compute_uv=False)
    shares = singular / singular.sum()
    assert effective_rank(vectors) == pytest.approx(np.exp(-np.sum(shares * np.log(shares))))
    # Four directions, equally filled; one direction alone.
    assert effective_rank(np.eye(4, 9)) == pytest.approx(4)
    assert effective_rank(np.outer(np.arange(1, 5), np.ones(9))) == pytest.approx(1, abs=1e-6)


def test_a_common_part_goes_with_the_mean():
    vectors = normal(200, 32) + 3
    found = layer(vectors)
    assert found.common > 0.9
    assert found.plain.mean_abs_cosine > 0.85
    assert found.centred.mean_abs_cosine == pytest.approx(random_mean_abs_cosine(32), rel=0.05)


def test_unseen_tokens_count_for_norms_alone():
    vectors = np.concatenate([normal(50, 8), 7 * np.ones((10, 8))])
    counts = np.array([3] * 25 + [40] * 25 + [0] * 10)
    found = LayerGeometry.of(4, vectors, counts)
    assert found.plain.mean_abs_cosine == Spread.of(vectors[:50]).mean_abs_cosine
    assert found.frequent.mean_abs_cosine == Spread.of(vectors[25:50]).mean_abs_cosine
    assert [(b["first"], b["last"], b["tokens"]) for b in found.norms] == [
        (0, 0, 10),
        (2, 3, 25),
        (32, 63, 25),
    ]
    assert found.norms[0]["mean"] == pytest.approx(7 * 8**0.5)


def test_bins_of_frequencies_are_powers_of_two():
    counts = np.arange(18)
    bins = norms_by_frequency(np.ones(18), counts)
    named = [(b["first"], b["last"]) for b in bins]
    assert named == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31)]
    assert [b["tokens"] for b in bins] == [1, 1, 2, 4, 8, 2]


def test_the_verdict_follows_the_angles():
    wide = [layer(normal(100, 32, seed), seed) for seed in range(3)]
    narrow = [layer(normal(100, 32, seed) + 1, seed) for seed in range(3)]
    assert spread_verdict(wide, narrow, "plain").word == "confirmed"
    assert spread_verdict(narrow, wide, "plain").word == "not confirmed"
    # Without what they share there is no difference.
    assert spread_verdict(wide, narrow, "centred").word == "not confirmed"
    mixed = [wide[0], narrow[1], wide[2]]
    other = [narrow[0], wide[1], narrow[2]]
    assert spread_verdict(mixed, other, "plain").word == "confirmed in 2 of 3 layers"
    # Layers that one of them lacks are left out.
    assert spread_verdict(wide, narrow[:1], "plain").layers == 1
    assert spread_verdict(wide, [], "plain") is None
