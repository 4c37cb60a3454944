"""Keys of n-grams: those of transformers' `qwen4_exp`, on the host and on the device."""

import dataclasses
import functools
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.errors import InputError
from stem_jax.memory import ngram
from tests.qwen4_exp import EOS, memory, ngram_embedding, their_ids, tokens_with_eos


def _equal_to_theirs(ours: ngram.NGramMemory, tokens_BxL: np.ndarray) -> bool:
    found = ours.keys(tokens_BxL, np.ones_like(tokens_BxL))
    assert found.dtype == np.int32
    return all(
        np.array_equal(
            found[..., ours.reads(layer)[0]],
            their_ids(ours, place, tokens_BxL) + ours.block(place).start,
        )
        for place, layer in enumerate(ours.layers)
    )


@pytest.mark.parametrize("vocab_size", [97, 32_000, 200_000])
@pytest.mark.parametrize("max_order", [2, 3, 4])
def test_keys_are_those_of_transformers(max_order, vocab_size):
    ours = memory(vocab_size, max_order)
    for length in (1, 2, 3, 40):
        assert _equal_to_theirs(ours, tokens_with_eos(vocab_size, length)), length


def test_tables_of_layers_follow_each_other():
    ours = memory(max_order=4, heads=3, pad_multiple=64)
    for place in (0, 1):
        theirs, block = ngram_embedding(ours, place), ours.block(place)
        assert block.stop - block.start == len(theirs.ngram_embedding.weight)
        assert ours.head_sizes[place] == tuple(theirs.head_vocab_sizes)
        assert list(ours.multipliers[place]) == theirs.layer_multipliers.tolist()
    assert ours.block(0).stop == ours.block(1).start and ours.block(1).stop == ours.num_keys
    assert ours.reads(1) == (slice(0, 9), 0) and ours.reads(4) == (slice(9, 18), 0)
    assert ours.reads(0) is None and ours.width == 6 and ours.reach == 3


def _without_eos(tokens, segment_ids, before, reach, eos_id, xp=np):
    """The rule but that an eos before the token's own ends nothing."""
    kept = ngram_preceding(tokens, segment_ids, before, reach, -1, xp)
    return [xp.where(read < 0, eos_id, read) for read in kept]


def _ended_by_own_eos(tokens, segment_ids, before, reach, eos_id, xp=np):
    found = ngram_preceding(tokens, segment_ids, before, reach, eos_id, xp)
    return [found[0], *(xp.where(tokens == eos_id, eos_id, read) for read in found[1:])]


ngram_preceding = ngram.preceding


@pytest.mark.parametrize("mutant", ["multiplier", "offset", "eos", "own_eos", "layer", "order"])
def test_another_rule_gives_other_keys(mutant, monkeypatch):
    ours, tokens_BxL = memory(), tokens_with_eos(97, 40)
    assert _equal_to_theirs(ours, tokens_BxL)
    if mutant == "multiplier":
        first, second = ours.multipliers
        vars(ours)["multipliers"] = (first, (*second[:-1], second[-1] + 2))
    elif mutant == "offset":
        first, second = ours.head_offsets
        vars(ours)["head_offsets"] = (first, (*second[:-1], second[-1] - 1))
    elif mutant == "eos":
        monkeypatch.setattr(ngram, "preceding", _without_eos)
    elif mutant == "own_eos":
        monkeypatch.setattr(ngram, "preceding", _ended_by_own_eos)
    elif mutant == "layer":
        vars(ours)["multipliers"] = ours.multipliers[::-1]
    elif mutant == "order":
        vars(ours)["head_sizes"] = tuple(sizes[::-1] for sizes in ours.head_sizes)
    assert not _equal_to_theirs(ours, tokens_BxL)


def _keys(ours, xp):
    return ours.keys if xp is np else jax.jit(ours.keys)


@pytest.mark.parametrize("xp", [np, jnp])
def test_packed_documents_have_the_keys_that_they_have_alone(xp):
    # With padding on both sides, whose keys nobody reads.
    ours, lengths = memory(max_order=4), (1, 2, 9, 3, 15)
    parts = [tokens_with_eos(97, 16, seed)[:, -length:] for seed, length in enumerate(lengths)]
    packed_BxL = np.concatenate(parts, 1)
    numbers = np.repeat([0, 1, 5, 6, 0], lengths)
    segments_BxL = np.broadcast_to(numbers, packed_BxL.shape)
    found = _keys(ours, xp)(packed_BxL, segments_BxL)
    alone = [ours.keys(part, np.ones_like(part)) for part in parts]
    np.testing.assert_array_equal(np.asarray(found), np.concatenate(alone, 1))


@pytest.mark.parametrize("xp", [np, jnp])
def test_windows_of_decoding_have_the_keys_of_the_whole(xp):
    ours, tokens_BxL = memory(max_order=4), tokens_with_eos(97, 20)
    ones_BxL = np.ones_like(tokens_BxL)
    whole = ours.keys(tokens_BxL, ones_BxL)
    history = np.concatenate([np.full((8, ours.reach), EOS, np.int32), tokens_BxL], 1)
    first = 0
    for size in (2, 1, 1, 14, 2):
        window = slice(first, first + size)
        before = history[:, first : first + ours.reach]
        found = _keys(ours, xp)(tokens_BxL[:, window], ones_BxL[:, window], before)
        np.testing.assert_array_equal(np.asarray(found), whole[:, window])
        first += size


def _both(ours, tokens_BxL, segments_BxL, before=None):
    on_device = jax.jit(ours.keys)(tokens_BxL, segments_BxL, before)
    assert on_device.dtype == jnp.int32
    host = ours.keys(tokens_BxL, segments_BxL, before)
    np.testing.assert_array_equal(np.asarray(on_device), host)
    assert host.min() >= 0 and host.max() < ours.num_keys


# The largest primes leave one bit free, those of 20 million keys seven.
@pytest.mark.parametrize(
    ("vocab_size", "keys_per_head"), [(200_000, 20_000_000), (2**28, 2**28), (1000, 1000)]
)
def test_a_million_windows_on_the_device(vocab_size, keys_per_head):
    ours = memory(vocab_size, 3, heads=1, keys_per_head=keys_per_head)
    rng = np.random.default_rng(0)
    # A third of them with an eos, so that shorter n-grams are there too.
    windows_Bx3 = rng.integers(0, vocab_size, (10**6, 3), np.int32)
    windows_Bx3[rng.random(windows_Bx3.shape) < 0.1] = EOS
    ones_Bx1 = np.ones((10**6, 1), np.int32)
    _both(ours, windows_Bx3[:, 2:], ones_Bx1, windows_Bx3[:, :2])


def test_the_largest_products_on_the_device():
    # One head with as many keys as a table may have, a prime, and products of up to 63 bits, their
    # halves of 16 bits at both ends.
    most = 2**31 - 1
    ours = memory(most, 2, heads=1, layers=(0,), pad_multiple=1)
    assert ours.num_keys == most
    low = np.array([0, 1, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF])
    tokens = (low[low < 2**15, None] << 16 | low).ravel()
    tokens = np.append(tokens[tokens < most], EOS).astype(np.int32)
    tokens_BxL = np.random.default_rng(0).choice(tokens, (50, 40))
    _both(ours, tokens_BxL, np.ones_like(tokens_BxL))


SOME = [memory(200, 2), memory(70_000, 3, seed=-5), memory(12, 4, heads=1, keys_per_head=3 * 10**7)]


@functools.cache
def _on_device(number: int):
    return jax.jit(SOME[number].keys)


@hypothesis.given(st.data())
def test_host_and_device_agree(data):
    number = data.draw(st.integers(0, len(SOME) - 1))
    ours = SOME[number]
    token = st.integers(0, ours.vocab_size - 1) | st.just(EOS)
    length = 4

    def draw(values, size):
        return np.array([data.draw(st.lists(values, min_size=size, max_size=size))], np.int32)

    segments_BxL = np.sort(draw(st.integers(0, 2), length))
    arrays = draw(token, length), segments_BxL, draw(token, ours.reach)
    found = _on_device(number)(*arrays)
    np.testing.assert_array_equal(np.asarray(found), ours.keys(*arrays))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_order": 1}, "ngram.max_order=1 must be at least 2"),
        ({"heads": 0}, "ngram.heads=0 must be at least 1"),
        ({"total_width": 10}, "ngram.width=10 does not divide over the 4 rows .* multiple of 4"),
        ({"keys_per_head": 96}, "ngram.keys_per_head=96 is below .*model.vocab_size=97.*as many"),
        ({"keys_per_head": 2**28}, "ngram.keys_per_head=268435456 .* 8 heads .* 2147483647 rows"),
        ({"keys_per_head": 2**28 - 1}, "more than the 2147483647 rows .* use fewer"),
        ({"keys_per_head": 10**15}, "more than the 2147483647 rows"),
        ({"eos_id": None}, "eos_id=None .* use a tokenizer that has an eos token"),
        ({"eos_id": 97}, "eos_id=97 is none of the 97 ids"),
        ({"layers": ()}, "must be one or more layers"),
        ({"layers": (4, 1)}, r"ngram.layers=\(4, 1\) must be .*rising"),
    ],
)
def test_what_cannot_be_is_refused(change, said):
    with pytest.raises(InputError, match=said) as refused:
        dataclasses.replace(memory(), **change)
    assert "\n" not in str(refused.value)


def test_the_loader_needs_no_jax():
    code = (
        "import sys, numpy as np; from stem_jax.memory.ngram import NGramMemory as M; "
        "x = np.ones((2, 3), np.int32); M(9, (0,), 2, 1, 9, 4, 0, 2).keys(x, x); "
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
