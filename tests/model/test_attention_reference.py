"""Attention of training, by every kernel that a CPU can run, against float64: both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.model.attention import attend


def _segments(L: int) -> np.ndarray:
    """[5, L]: a document; documents of one token; of one to many; padding behind; only padding."""
    many, place = [], 0
    while len(many) < L:
        place += 1
        many += [place] * place
    padded = np.where(np.arange(L) < L - 19, 1 + (np.arange(L) > 2), 0)
    rows = [np.ones(L), 1 + np.arange(L), many[:L], padded, np.zeros(L)]
    return np.asarray(rows, np.int32)


def _reference(q_BxLxHxD, k_BxLxKxD, v_BxLxKxD, segments_BxL, gradient_BxLxHxD):
    """Output and gradients in float64, with the formulas written out."""
    q, k, v, gradient = (
        np.asarray(x, np.float64).swapaxes(1, 2)
        for x in (q_BxLxHxD, k_BxLxKxD, v_BxLxKxD, gradient_BxLxHxD)
    )
    group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    k_BxHxLxD, v_BxHxLxD = (np.repeat(x, group, axis=1) for x in (k, v))
    same_BxLxL = segments_BxL[:, :, None] == segments_BxL[:, None, :]
    seen_Bx1xLxL = np.tril(same_BxLxL)[:, None]
    scores = np.where(seen_Bx1xLxL, q @ k_BxHxLxD.swapaxes(-1, -2) * scale, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    d_weights = gradient @ v_BxHxLxD.swapaxes(-1, -2)
    sums = np.sum(d_weights * weights, axis=-1, keepdims=True)
    d_scores = weights * (d_weights - sums) * scale
    d_k, d_v = d_scores.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ gradient
    B, H, L, Dh = q.shape
    d_k, d_v = (x.reshape(B, H // group, group, L, Dh).sum(axis=2) for x in (d_k, d_v))
    found = weights @ v_BxHxLxD, d_scores @ k_BxHxLxD, d_k, d_v
    return [x.swapaxes(1, 2) for x in found]


@pytest.mark.parametrize(
    ("kernel", "L", "H", "K", "Dh"),
    [
        ("xla", 45, 6, 2, 64),
        ("chunked", 45, 4, 4, 80),
        ("chunked", 128, 4, 1, 256),
        ("splash", 128, 4, 1, 64),
        ("splash", 128, 2, 2, 128),
        pytest.param("splash", 256, 4, 2, 256, marks=pytest.mark.long),
        pytest.param("splash", 384, 6, 2, 96, marks=pytest.mark.long),
        pytest.param("chunked", 384, 6, 2, 128, marks=pytest.mark.long),
    ],
)
def test_a_kernel_is_near_float64_both_ways(kernel, L, H, K, Dh):
    rng, segments = np.random.default_rng(L + Dh), _segments(L)
    q, k, v, gradient = (
        rng.normal(size=(len(segments), L, heads, Dh)).astype(np.float32) for heads in (H, K, K, H)
    )

    @jax.jit
    def both_ways(q, k, v, gradient):
        out, pull = jax.vjp(lambda *x: attend(*x, jnp.asarray(segments), kernel, None), q, k, v)
        return out, *pull(gradient)

    expected = _reference(q, k, v, segments, gradient)
    for found, right in zip(both_ways(q, k, v, gradient), expected, strict=True):
        assert found.dtype == np.float32
        # Of each row alone. Gradients of scores are differences of products with the output's
        # gradient, which of a document of one token are all of them zero.
        error, size, given = (
            np.linalg.norm(x.reshape(len(x), -1), axis=1) for x in (found - right, right, gradient)
        )
        np.testing.assert_array_less(error, 6e-7 * np.maximum(size, given))
