"""Attention without an array of all pairs: in chunks of queries, and by the kernels of GPUs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from stem_jax.context_order import slots
from stem_jax.kernels.document_attention import (
    _mask,
    document_attention,
    document_starts,
    keys_of,
)
from stem_jax.model.attention import attend
from stem_jax.model.einsum_attention import chunked_attention, document_mask
from stem_jax.planning import gpus
from stem_jax.planning.topology import Topology


def _inputs(L: int, H: int, K: int, Dh: int, dtype=jnp.float32):
    """Documents of one token, of some, and of the rest; the other row ends in padding."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weights = (
        jax.random.normal(key, (2, L, heads, Dh)).astype(dtype)
        for key, heads in zip(keys, (H, K, K, H), strict=True)
    )
    first = 1 + np.searchsorted([1, 2, 70], np.arange(L), side="right")
    segments = np.stack([first, np.arange(L) < L - 20]).astype(np.int32)
    return q, k, v, jnp.asarray(segments), weights


def _shapes(*sizes) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _inputs(*sizes)]


@functools.partial(jax.jit, static_argnums=0)
def _both_ways(attention, q, k, v, segments, weights):
    """The output and the gradients of its weighted sum."""
    out, pull = jax.vjp(lambda *heads: attention(*heads, segments), q, k, v)
    return out, *pull(weights)


def _whole(q, k, v, segments):
    return attend(q, k, v, segments, "xla", None)


# Less than a chunk of 32, one, and several with and without a rest.
@pytest.mark.parametrize(
    ("L", "H", "K", "Dh"), [(20, 4, 2, 8), (32, 2, 2, 8), (150, 4, 1, 8), (192, 2, 1, 64)]
)
def test_chunks_equal_the_whole(L, H, K, Dh):
    inputs = _inputs(L, H, K, Dh)
    # Products on CPUs do not depend on how many rows they have, up to their rounding. The gradient
    # of a first key has parts of 130 queries of 4 heads, of which each chunk makes a sum: their
    # order moves it by some of its parts' last bits.
    whole = _both_ways(_whole, *inputs)
    for found, expected in zip(_both_ways(chunked_attention, *inputs), whole, strict=True):
        np.testing.assert_allclose(found, expected, atol=4e-6)


def test_gradients_of_keys_sum_over_chunks_in_float32():
    half = _inputs(2048, 1, 1, 8, jnp.bfloat16)
    *heads, segments, weights = half
    heads, weights = [x.astype(jnp.float32) for x in heads], weights.astype(jnp.float32)
    exact = _both_ways(_whole, *heads, segments, weights)

    def errors(attention):
        found = _both_ways(attention, *half)
        assert all(x.dtype == jnp.bfloat16 for x in found)
        return [
            np.linalg.norm(np.asarray(x, np.float32) - y) / np.linalg.norm(y)
            for x, y in zip(found, exact, strict=True)
        ]

    # Each chunk's part is rounded; sums in bfloat16 would be 1.9 times as far off as the whole.
    for chunks, whole in zip(errors(chunked_attention), errors(_whole), strict=True):
        assert chunks < 1.4 * whole


def test_memory_grows_with_the_length_alone():
    def temporaries(attention, L: int) -> int:
        compiled = _both_ways.lower(attention, *_shapes(L, 2, 1, 8)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    chunks, whole = (
        [temporaries(attention, L) for L in (1024, 2048)]
        for attention in (chunked_attention, _whole)
    )
    assert chunks[1] <= 2.1 * chunks[0] and whole[1] > 3.5 * whole[0]


@pytest.mark.long
@pytest.mark.skipif(gpus.missing() is not None, reason=f"{gpus.missing()}: {gpus.INSTALL_CUDA}")
@pytest.mark.parametrize(("batch", "length", "heads", "before"), [(16, 2048, (15, 5), 499.8)])
def test_a_layer_on_a_gpu_needs_less_than_with_all_pairs(batch, length, heads, before):
    """MiB that cuDNN took for the same with a bias of all pairs, its workspace included."""
    device = Topology.parse("h100:1").devices()[0]

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=SingleDeviceSharding(device))

    wide, narrow = (shape(batch, length, number, 64) for number in heads)
    segments = shape(batch, length, dtype=jnp.int32)
    lowered = _both_ways.lower(chunked_attention, wide, narrow, narrow, segments, wide)
    compiled = lowered.compile(compiler_options=gpus.OPTIONS)
    assert compiled.memory_analysis().temp_size_in_bytes / 2**20 < 0.85 * before


def test_a_document_starts_where_the_segment_id_changes():
    segments = jnp.array([[5, 5, 1, 1, 0, 0], [1, 2, 2, 2, 3, 3]])
    assert document_starts(segments).tolist() == [[0, 0, 2, 2, 4, 4], [0, 1, 1, 1, 4, 4]]


def _lowered(attention, platform: str) -> str:
    traced = _both_ways.trace(attention, *_shapes(384, 4, 2, 64, jnp.bfloat16))
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_cudnn_is_causal_over_whole_rows(monkeypatch):
    """Forward and backward; with a mask of documents it would read, and give, all pairs."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    text = _lowered(lambda *x: attend(*x, "cudnn", None), "cuda")
    calls = re.findall(
        r"custom_call @(__cudnn\$fmha\w*).*?mask_type[^A-Z]*([A-Z_]+)", text, re.DOTALL
    )
    kernels = ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert calls == [(kernel, "CAUSAL") for kernel in kernels]
    assert "384x384" not in text


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_chunks_know_no_array_of_all_pairs(platform):
    assert "384x384" in _lowered(_whole, platform)
    assert "384x384" not in _lowered(chunked_attention, platform)


@pytest.mark.parametrize("device", [None, 1])
def test_gpus_get_kernels(device, monkeypatch):
    """As far as a machine without one can tell: both passes, without an array of all pairs.

    Of whole sequences, or of the queries of one of three devices.
    """
    pytest.importorskip("tokamax")
    from tokamax._src import gpu_utils
    from tokamax._src.ops import op

    monkeypatch.setattr(gpu_utils, "_compute_capability", lambda device=None: 9.0)
    monkeypatch.setattr(gpu_utils, "has_mosaic_gpu_support", lambda device=None: True)
    monkeypatch.setattr(op.Op, "supported_on", lambda self, device: True)

    def attention(q, k, v, segments):
        if device is None:
            return document_attention(q, k, v, segments)
        own = slots(384, 3).reshape(3, -1)[device]
        out = document_attention(q[:, own], k, v, segments, jnp.asarray(own))
        return jnp.tile(out, (1, 3, 1, 1))

    text = _lowered(attention, "cuda")
    kernels = re.findall(r"custom_call @(mosaic_gpu\w*)", text)
    # Forward, and the gradients of queries and of keys and values.
    assert len(kernels) >= 2 and "384x384" not in text and "128x384" not in text


def test_the_keys_of_a_query_in_a_sequence():
    """The range that the kernels of GPUs get is the mask of documents, for every device's part."""
    pytest.importorskip("tokamax")
    segments = _inputs(96, 1, 1, 8)[3]
    for own in slots(96, 4).reshape(4, -1):
        first_keys, ends = keys_of(segments, jnp.asarray(own))
        found = _mask(first_keys, ends).as_array(len(own), 96)
        expected = document_mask(segments[:, own], segments, jnp.asarray(own))
        np.testing.assert_array_equal(np.broadcast_to(found, expected.shape), expected)
