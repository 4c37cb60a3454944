"""The chunked, sharded head loss against log_softmax in float64."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.kernels import head_loss as module
from stem_jax.kernels.head_loss import head_loss
from stem_jax.planning import hlo
from stem_jax.planning.topology import Topology

B, L, D, V = 8, 12, 16, 40
CHUNKS = [1, 4, 5, 12, 100, None]


def _inputs(seed=0, shape=(B, L)):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(*shape, D)).astype(np.float32)
    head = rng.normal(size=(D, V)).astype(np.float32)
    targets = rng.integers(0, V, shape).astype(np.int32)
    scored = rng.random(shape) < 0.7
    return hidden, head, targets, (scored / scored.sum()).astype(np.float32)


def _oracle(hidden, head, targets, weights, z_loss):
    """Loss, cross-entropy and gradients of the loss, float64, by the textbook formulas."""
    hidden, head, weights = (x.astype(np.float64) for x in (hidden, head, weights))
    logits = hidden @ head
    log_z = np.log(np.sum(np.exp(logits), axis=-1))
    log_p = logits - log_z[..., None]
    onehot = np.eye(V)[targets]
    cross_entropy = -np.sum(weights * np.sum(log_p * onehot, axis=-1))
    loss = cross_entropy + z_loss * np.sum(weights * log_z**2)
    d_logits = np.exp(log_p) * (1 + 2 * z_loss * log_z)[..., None] - onehot
    d_logits *= weights[..., None]
    return loss, cross_entropy, d_logits @ head.T, np.einsum("bld,blv->dv", hidden, d_logits)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _value_and_gradients(hidden, head, targets, weights, z_loss, chunk, mesh):
    def loss(hidden, head):
        return head_loss(hidden, head, targets, weights, z_loss, chunk, mesh)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)


def _check(chunk, mesh, z_loss, inputs):
    (loss, cross_entropy), gradients = _value_and_gradients(*inputs, z_loss, chunk, mesh)
    expected = _oracle(*inputs, z_loss)
    np.testing.assert_allclose([loss, cross_entropy], expected[:2], rtol=1e-6)
    for found, wanted in zip(gradients, expected[2:], strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    value = jax.jit(head_loss, static_argnums=(4, 5, 6))(*inputs, z_loss, chunk, mesh)
    np.testing.assert_allclose(value, expected[:2], rtol=1e-6)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_one_device(chunk, z_loss):
    _check(chunk, None, z_loss, _inputs())


# 45 tokens in chunks of 9 and of 27, which are 16 and 32 on the way; 64 tokens, which divide.
@pytest.mark.parametrize("shape, chunk", [((9, 5), 1), ((9, 5), 3), ((4, 16), 4), ((1, 50), 17)])
def test_lengths_that_do_and_do_not_divide(shape, chunk):
    _check(chunk, None, 1e-2, _inputs(2, shape))


@pytest.mark.parametrize("tokens, most", [(16, 2**30), (40, 2**30), (2048, 4 * V * 24)])
def test_a_chunk_of_the_devices_tokens(tokens, most, monkeypatch):
    monkeypatch.setattr(module, "_TOKENS_AT_A_TIME", tokens)
    monkeypatch.setattr(module, "_MOST_BYTES", most)
    sizes = []
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    monkeypatch.setattr(module.jnp, "dot", lambda a, b, **_: sizes.append(a.shape) or dot(a, b))
    jax.clear_caches()
    _check(None, None, 1e-2, _inputs(3))
    assert max(rows for rows, width in sizes if width == D) <= min(tokens, most // (4 * V))


def test_the_ways_to_the_targets_logit_agree(monkeypatch):
    """The one of CPUs and the one of other platforms, also of targets on other devices."""
    logits = np.random.default_rng(0).normal(size=(6, V)).astype(np.float32)
    targets = np.array([-40, -1, 0, 17, V - 1, V], np.int32)
    arrays = logits, np.arange(V) == targets[:, None], targets
    expected = [0, 0, logits[2, 0], logits[3, 17], logits[4, V - 1], 0]
    np.testing.assert_array_equal(module._gathered(*arrays), expected)
    np.testing.assert_array_equal(module._summed(*arrays), expected)
    monkeypatch.setattr(module, "_gathered", module._summed)
    jax.clear_caches()
    _check(5, None, 1e-2, _inputs(4))


@pytest.mark.parametrize("chunk", [5, 100])
@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_meshes(shape, chunk, device_mesh):
    # With tensor > 1 every device has a slice of the vocabulary, with fsdp > 1 one of D.
    _check(chunk, device_mesh(shape), 1e-2, _inputs(1))


def test_every_position_masked():
    hidden, head, targets, weights = _inputs()
    (loss, _), gradients = _value_and_gradients(
        hidden, head, targets, np.zeros_like(weights), 1e-2, 5, None
    )
    assert loss == 0 and not any(np.any(g) for g in gradients)


def test_masked_positions_have_no_influence():
    hidden, head, targets, weights = _inputs()
    masked = weights == 0
    other = np.where(masked[..., None], 50.0, hidden).astype(np.float32)
    changed = np.where(masked, 0, targets).astype(np.int32)
    first = _value_and_gradients(hidden, head, targets, weights, 1e-2, 5, None)
    second = _value_and_gradients(other, head, changed, weights, 1e-2, 5, None)
    for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.any(np.asarray(first[1][0])[masked])


def test_large_logits_do_not_overflow():
    hidden, head, targets, weights = _inputs()
    (loss, _), gradients = _value_and_gradients(1e3 * hidden, head, targets, weights, 0.0, 5, None)
    logits = 1e3 * hidden.astype(np.float64) @ head
    gap = logits.max(-1) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    assert loss == pytest.approx(np.sum(weights * gap), rel=1e-4)
    assert all(np.all(np.isfinite(g)) for g in gradients)


def test_the_cotangent_scales_the_gradients():
    inputs = _inputs()

    @jax.grad
    def tripled(head):
        return 3 * head_loss(inputs[0], head, *inputs[2:], 0.0, 5, None)[0]

    once = _value_and_gradients(*inputs, 0.0, 5, None)[1][1]
    np.testing.assert_allclose(tripled(inputs[1]), 3 * once, rtol=1e-6)


@pytest.mark.optimized
def test_half_precision_keeps_its_dtypes():
    hidden, head, targets, weights = _inputs()
    half = jnp.asarray(hidden, jnp.bfloat16)
    (loss, _), (d_hidden, d_head) = _value_and_gradients(half, head, targets, weights, 0.0, 5, None)
    assert (loss.dtype, d_hidden.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (hidden, head)]
    expected = _oracle(*rounded, targets, weights, 0.0)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    # bfloat16 has eight significant bits: one rounding of d_logits, one of the result.
    np.testing.assert_allclose(
        np.asarray(d_hidden, np.float32),
        expected[2],
        rtol=0,
        atol=2**-7 * np.abs(expected[2]).max(),
    )


@pytest.mark.optimized
def test_chunks_bound_the_memory():
    """4 x 512 positions of 8192 logits are 64 MiB; a chunk of 32 holds a sixteenth of them."""
    shapes = [
        jax.ShapeDtypeStruct((4, 512, 64), jnp.float32),
        jax.ShapeDtypeStruct((64, 8192), jnp.float32),
        jax.ShapeDtypeStruct((4, 512), jnp.int32),
        jax.ShapeDtypeStruct((4, 512), jnp.float32),
    ]

    def plain(hidden, head, targets, weights):
        def loss(hidden, head):
            log_p = jax.nn.log_softmax(hidden @ head)
            picked = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
            return -jnp.sum(weights * picked)

        return jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)

    def peak(compiled):
        return compiled.memory_analysis().temp_size_in_bytes

    chunked = peak(_value_and_gradients.lower(*shapes, 0.0, 32, None).compile())
    whole = peak(_value_and_gradients.lower(*shapes, 0.0, 512, None).compile())
    textbook = peak(jax.jit(plain).lower(*shapes).compile())
    assert textbook > 60 * 2**20
    assert chunked < textbook / 4 and chunked < whole / 4


@pytest.mark.long
@pytest.mark.optimized
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: no TPU compiler"
)
def test_cycles_and_memory_on_a_tpu():
    """32k tokens of the 1B shape on a v5e: three matmuls are 408 M of its compiler's cycles."""
    tokens, width, vocab = (8, 4096), 2048, 128256
    shapes = [((*tokens, width), jnp.bfloat16), ((width, vocab), jnp.float32)]
    shapes += [(tokens, jnp.int32), (tokens, jnp.float32)]
    place = jax.sharding.SingleDeviceSharding(Topology.parse("v5e:1x1").devices()[0])
    arrays = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]
    compiled = _value_and_gradients.lower(*arrays, 0.0, None, None).compile()
    text = compiled.as_text()
    cycles = dict(re.findall(r"%?([\w.\-]+) = .*\"estimated_cycles\":\"(\d+)\"", text))
    runs = hlo.parse(text).scheduled()
    total = sum(int(cycles.get(found.name.lstrip("%"), 0)) * times for found, times in runs)
    assert 400e6 < total < 530e6
    # Float32 logits of a chunk, their exponentials and the head in bfloat16, nothing twice.
    expected = (4 + 2) * 2048 * vocab + 2 * width * vocab
    assert compiled.memory_analysis().temp_size_in_bytes < 1.01 * expected
