"""Which tokens may be drawn, and how often they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stem_jax.errors import InputError
from stem_jax.generation.sampling import Sampling, keep_likeliest, sample

_keep = jax.jit(keep_likeliest)
_sample = jax.jit(sample)


@given(
    logits=st.lists(
        st.sampled_from([-7.5, -2.0, -0.0, 0.0, 0.25, 1.0, 3.0])
        | st.floats(-9, 9, width=32, allow_subnormal=False),
        min_size=16,
        max_size=16,
    ),
    top_k=st.integers(0, 20),
    top_p=st.sampled_from([1.0]) | st.floats(2**-7, 1.0, width=32),
)
@example(logits=[-0.0, 0.0] * 8, top_k=3, top_p=1.0)
@settings(max_examples=150)
def test_the_likeliest_tokens_are_kept(logits, top_k, top_p):
    logits_V = np.asarray(logits, np.float32)
    kept_V = np.isfinite(_keep(logits_V[None], np.int32(top_k), np.float32(top_p))[0])
    order = np.argsort(-logits_V, kind="stable")[: top_k or None]
    weights = np.exp(logits_V[order].astype(np.float64))
    mass = np.cumsum(weights / weights.sum())
    count = kept_V.sum()
    assert set(np.flatnonzero(kept_V)) == set(order[:count])
    if top_p == 1.0:
        assert count == min(top_k or 16, 16)
    else:
        # The fewest that reach p, up to what float32 sums of 16 shares can tell.
        assert mass[count - 1] > top_p - 1e-6
        assert count == 1 or mass[count - 2] < top_p + 1e-6


def test_samples_have_the_softmax_distribution():
    logits_V = np.asarray([1.0, 0.0, -0.5, 2.0, 0.7, -3.0], np.float32)
    number = 20000
    logits_BxV = np.broadcast_to(logits_V, (number, 6))
    seeds_B = np.arange(number, dtype=np.uint32)

    def shares(*scalars):
        token_B = _sample(logits_BxV, seeds_B, np.int32(3), *Sampling(*scalars).scalars())
        return np.bincount(np.asarray(token_B), minlength=6) / number

    def expected(temperature, tokens):
        weights = np.where(np.isin(np.arange(6), tokens), np.exp(logits_V / temperature), 0)
        return weights / weights.sum()

    # Four standard deviations of a share of 20,000 draws are at most 0.0142.
    np.testing.assert_allclose(shares(1.0, 0, 1.0), expected(1.0, range(6)), atol=0.0142)
    np.testing.assert_allclose(shares(0.5, 0, 1.0), expected(0.5, range(6)), atol=0.0142)
    np.testing.assert_allclose(shares(1.0, 3, 1.0), expected(1.0, [3, 0, 4]), atol=0.0142)
    # Shares are .49 .18 .13 ...: two tokens reach 0.6 of all.
    np.testing.assert_allclose(shares(1.0, 0, 0.6), expected(1.0, [3, 0]), atol=0.0142)
    assert shares(0.0, 3, 0.6)[3] == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0)],
)
def test_sampling_refuses_values_out_of_range(field, value):
    with pytest.raises(InputError, match=f"{field}={value}"):
        Sampling(**{field: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 3_000_000_000}, "top_k=3000000000 must be from 0 .all tokens. to 2147483647"),
        ({"top_k": -1}, "top_k=-1 must be from 0"),
        ({"top_p": 1e-46}, "top_p=1e-46 must be at least 1.2e-38"),
        ({"top_p": 1e-40}, "top_p=1e-40 must be at least 1.2e-38"),
        ({"top_p": 0.0}, "top_p=0.0 must be at least"),
        ({"top_p": float("nan")}, "top_p=nan must be at least"),
        ({"temperature": 1e-38}, "temperature=1e-38 must be 0 .greedy. or from 1e-30"),
        ({"temperature": 1e39}, "temperature=1e.39 must be 0 .greedy. or from 1e-30"),
        ({"temperature": float("nan")}, "temperature=nan must be 0"),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
    ],
)
def test_values_that_the_device_has_not(values, message):
    with pytest.raises(InputError, match=message):
        Sampling(**values)


@pytest.mark.parametrize(
    "scalars", [(1e-30, 0, 1.0), (1.0, 0, 1.2e-38), (1.0, 1, 1.0), (1e-30, 2**31 - 1, 1.2e-38)]
)
def test_the_most_extreme_values_give_the_likeliest(scalars):
    logits_1xV = jnp.asarray([[-9.0, 3.0, 3.5, 3.25]])
    token = sample(logits_1xV, jnp.uint32([1]), 0, *Sampling(*scalars).scalars())
    assert token.tolist() == [2]
