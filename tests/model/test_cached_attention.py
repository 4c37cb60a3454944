"""Attention to the positions before: against float64, and a prompt by the kernel of training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.generation.generator import Generator
from stem_jax.model.cache import NewCache
from stem_jax.model.einsum_attention import cached_attention
from stem_jax.training.blueprint import Blueprint
from stem_jax.training.state import init_state


def _reference(q_LxHxD, k_TxKxD, v_TxKxD, before: int) -> np.ndarray:
    """One sequence, each of its queries on its own, in float64."""
    group = q_LxHxD.shape[1] // k_TxKxD.shape[1]
    out = np.zeros(q_LxHxD.shape)
    for place, h in np.ndindex(*q_LxHxD.shape[:2]):
        end = before + place + 1
        keys, values = (x[:end, h // group].astype(np.float64) for x in (k_TxKxD, v_TxKxD))
        scores = keys @ q_LxHxD[place, h].astype(np.float64) / np.sqrt(keys.shape[1])
        weights = np.exp(scores - scores.max())
        out[place, h] = weights @ values / weights.sum()
    return out


@pytest.mark.parametrize(
    ("L", "H", "K", "Dh"), [(1, 4, 1, 64), (1, 2, 2, 256), (3, 6, 2, 128), (2, 2, 1, 96)]
)
def test_sequences_of_unequal_lengths_see_their_own(L, H, K, Dh):
    T = 40
    rng, before = np.random.default_rng(0), [0, 7, T - L]
    q, k, v = (
        rng.normal(size=(3, n, heads, Dh)).astype(np.float32)
        for n, heads in ((L, H), (T, K), (T, K))
    )
    expected = [_reference(q[b], k[b], v[b], n) for b, n in enumerate(before)]
    # What is behind the end was of another sequence once.
    for b, n in enumerate(before):
        k[b, n + L :], v[b, n + L :] = 50, 1e4
    heads_first = k.swapaxes(1, 2), v.swapaxes(1, 2)
    found = jax.jit(cached_attention)(q, *heads_first, np.array(before, np.int32))
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_cache_grows_by_what_each_sequence_adds():
    T, added = 8, ([3, 1, 2], [1, 0, 2], [4, 2, 1])
    rng = np.random.default_rng(1)
    cache, kept = NewCache(T), [np.zeros((0, 2, 4)) for _ in range(3)]
    for lengths in added:
        new = rng.normal(size=(3, max(lengths), 2, 4)).astype(np.float32)
        cache = cache.extend(jnp.asarray(new), jnp.asarray(2 * new), jnp.array(lengths))
        kept = [np.concatenate([old, x[:n]]) for old, x, n in zip(kept, new, lengths)]
    assert cache.lengths.tolist() == [8, 3, 5]
    held = cache.keys.swapaxes(1, 2), cache.values.swapaxes(1, 2)
    for keys, values, expected in zip(*held, kept, strict=True):
        np.testing.assert_array_equal(keys[: len(expected)], expected)
        np.testing.assert_array_equal(values[: len(expected)], 2 * expected)


def test_a_prompt_goes_through_the_kernel_of_training(tiny_config, device_mesh):
    make = functools.partial(
        tiny_config,
        **{
            "model.num_layers": 1,
            "model.stem_layers": "none",
            "model.head_dim": 64,
            "train.seq_len": 128,
        },
    )
    config = make()
    params = init_state(Blueprint(config, device_mesh((1, 1, 1)))).params
    tokens_BxL = np.random.default_rng(2).integers(0, 88, (2, 128), np.int32)
    arguments = params, {}, tokens_BxL, np.array([128, 70], np.int32), [NewCache(256)]

    def advance(kernel: str):
        generator = Generator(make(**{"model.attention": kernel}), params, {}, None)
        return jax.jit(generator.advance)

    program = {kernel: str(advance(kernel).trace(*arguments).jaxpr) for kernel in ("splash", "xla")}
    # The mask of all pairs.
    mask = "bool[2,1,128,128]"
    assert "splash_forward" in program["splash"] and mask not in program["splash"]
    assert mask in program["xla"]
    found, expected = (advance(kernel)(*arguments) for kernel in ("splash", "xla"))
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4)
    # The next token reads what either has left in the cache.
    token, one = np.array([[5], [6]], np.int32), np.ones(2, np.int32)
    longer = [advance("xla")(params, {}, token, one, *after)[0] for _, after in (found, expected)]
    np.testing.assert_allclose(*longer, atol=1e-4)
