"""Heads on their way into the TPU's attention kernel, against plain operations. Interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import NamedSharding, PartitionSpec

from stem_jax.kernels.heads import gradient_to_heads, to_heads
from stem_jax.kernels.splash import block_sizes, causal_masks, splash
from stem_jax.mesh import make_mesh
from stem_jax.model.attention import Attention, _splash
from stem_jax.model.rotary import rotary_angles, rotate
from stem_jax.planning.topology import Topology


def _inputs(L: int, Dh: int, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(L + Dh), 4)
    x = jax.random.normal(keys[0], (2, 3, Dh, L), dtype)
    cotangent = jax.random.normal(keys[1], (2, 3, L, Dh), dtype)
    angle = jax.random.normal(keys[2], (2, Dh // 2, L))
    # No angle has these: each of the two is read in its place.
    return x, cotangent, (jnp.cos(angle) * 1.5, jnp.sin(angle) * 0.5)


def _plain(x_BxHxDxL, angles):
    x_BxLxHxD = x_BxHxDxL.transpose(0, 3, 1, 2)
    turned = rotate(x_BxLxHxD, tuple(a.swapaxes(1, 2) for a in angles))
    return turned.transpose(0, 2, 1, 3)


def _both_ways(function, *arguments):
    """Value and the pull of a cotangent, as one program."""

    @jax.jit
    def run(x, cotangent):
        value, pull = jax.vjp(function, x)
        return value, *pull(cotangent)

    return run(*arguments)


# 384: of three blocks of 128; 4096: of two of the largest.
@pytest.mark.parametrize(
    ("L", "Dh", "dtype"), [(128, 8, "float32"), (384, 96, "bfloat16"), (4096, 16, "float32")]
)
def test_heads_are_rotated_as_by_plain_operations_and_back(L, Dh, dtype):
    x, cotangent, angles = _inputs(L, Dh, dtype)
    expected = _both_ways(lambda x: _plain(x, angles), x, cotangent)
    found = _both_ways(lambda x: to_heads(x, angles, True), x, cotangent)
    tolerance = 1e-6 if dtype == "float32" else 0.02
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        one, other = (np.asarray(a, np.float32) for a in (one, other))
        np.testing.assert_allclose(one, other, atol=tolerance, rtol=tolerance)


def test_heads_are_turned_there_and_back():
    x, cotangent, _ = _inputs(640, 32)
    turned, back = x.swapaxes(-1, -2), cotangent.swapaxes(-1, -2)
    found = _both_ways(lambda x: to_heads(x, None, True), x, cotangent)
    for one, other in zip(found, (turned, back), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("L", "Dh", "dtype"), [(128, 8, "float32"), (384, 96, "bfloat16"), (4096, 16, "float32")]
)
def test_a_gradient_is_turned_and_multiplied_by_the_output(L, Dh, dtype):
    gradient, cotangent, _ = _inputs(L, Dh, dtype)
    out = cotangent.swapaxes(-1, -2)
    turned, sums = jax.jit(lambda *arrays: gradient_to_heads(*arrays, True))(gradient, out)
    np.testing.assert_array_equal(turned, gradient.swapaxes(-1, -2))
    assert turned.dtype == dtype and sums.dtype == jnp.float32
    products = np.asarray(gradient, np.float64) * np.asarray(out, np.float64)
    np.testing.assert_allclose(sums, products.sum(axis=2), atol=1e-5)


def test_a_layer_attends_by_splash_as_by_xla(tiny_config, device_mesh):
    """Values and gradients; with 2 KV heads on 4 devices each head is on two of them."""
    mesh = device_mesh((1, 2, 4))
    outputs = []
    x = jax.random.normal(jax.random.key(1), (2, 128, 32))
    places = jnp.broadcast_to(jnp.arange(128), (2, 128))
    segments = 1 + (places > jnp.array([[50], [100]])).astype(jnp.int32)
    for kernel in ("xla", "splash"):
        keys = {"num_heads": 4, "num_kv_heads": 2, "attention": kernel, "embed_dim": 32}
        # Its angles carry a factor, as those of queries do for the kernel.
        keys |= {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_len": 32}
        config = tiny_config(**{f"model.{name}": value for name, value in keys.items()}).model
        layer = Attention(config, 1.0, mesh, rngs=nnx.Rngs(0))
        graph, state = nnx.split(layer)
        angles = rotary_angles(places, config)

        def loss(state, x, graph=graph, angles=angles):
            out, _ = nnx.merge(graph, state)(x, angles, segments)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
            state, x
        )
        outputs.append(jax.tree.leaves((out, gradients)))
    for one, other in zip(*outputs, strict=True):
        np.testing.assert_allclose(other, one, atol=5e-5)


# Of one block, and of three.
@pytest.mark.parametrize(("L", "K"), [(256, 4), (768, 2)])
def test_the_attention_kernel_computes_what_that_of_jax_does(L, K):
    """The output bit for bit; gradients but for the order of the sums of output times gradient."""
    Dh = 64
    keys = jax.random.split(jax.random.key(K), 4)
    q = jax.random.normal(keys[0], (2, 4, L, Dh))
    k, v = (jax.random.normal(key, (2, K, L, Dh)) for key in keys[1:3])
    gradient = jax.random.normal(keys[3], q.shape)
    segments = 1 + (jnp.arange(L) >= jnp.array([[100], [200]])).astype(jnp.int32)
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((L, L))] * 4)

    def by_library(*heads):
        kernel = splash_attention_kernel.make_splash_mha_single_device(
            mask, block_sizes=block_sizes(L, Dh), interpret=True
        )
        ids = splash_attention_kernel.SegmentIds(segments, segments)
        return jax.vmap(kernel)(*heads, segment_ids=ids)

    def by_ours(*heads):
        return splash(*heads, segments, True).swapaxes(-1, -2)

    @functools.partial(jax.jit, static_argnums=0)
    def run(attend, *heads):
        out, pull = jax.vjp(attend, *heads)
        return out, pull(gradient)

    (out, found), (expected, gradients) = (run(f, q, k, v) for f in (by_ours, by_library))
    np.testing.assert_array_equal(out, expected)
    for one, other in zip(found, gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize(
    ("L", "Dh", "block"),
    [(128, 64, 128), (384, 64, 128), (2048, 64, 512), (8192, 128, 1024), (8192, 256, 512)],
)
def test_blocks_divide_the_length_and_are_large(L, Dh, block):
    sizes = block_sizes(L, Dh)
    assert {sizes.block_q, sizes.block_kv, sizes.block_q_dkv, sizes.block_kv_dq} == {block}
    assert L % block == 0


def test_blocks_of_the_1b_shape_are_few():
    """Of a layer and pass of one v5e of 64: 8 sequences of 4096, 32 heads."""
    masks = causal_masks(np.arange(4096, dtype=np.int32), 1, 64)
    for info in (masks.forward, masks.of_queries, masks.of_keys):
        # With blocks of 128: 262,144 steps of the grid, 135,168 of them with work.
        assert 8 * 32 * info.block_mask.size == 16_384
        assert 8 * 32 * np.count_nonzero(info.block_mask) == 9_216


@pytest.mark.parametrize(
    ("topology", "L", "Dh"),
    [
        ("v5e:1x1", 2048, 256),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ("v5e:1x1", 8192, 128),
                ("v5p:2x2x1", 8192, 128),
                ("v5p:2x2x1", 8192, 256),
            )
        ),
    ],
)
def test_blocks_fit_the_chip(topology, L, Dh, tiny_config):
    """What its compiler refuses otherwise."""
    pytest.importorskip("libtpu")
    mesh = make_mesh(tiny_config().mesh, Topology.parse(topology).devices()[:1])
    whole = NamedSharding(mesh, PartitionSpec())

    def both_ways(q, k, v, segments, cotangent):
        attend = functools.partial(_splash, angles=None, segment_ids_BxL=segments, mesh=mesh)
        return jax.vjp(lambda *heads: attend(*heads), q, k, v)[1](cotangent)

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=whole)

    heads, kv_heads = shape(4, 8, Dh, L), shape(4, 4, Dh, L)
    ids = shape(4, L, dtype=jnp.int32)
    assert jax.jit(both_ways).lower(heads, kv_heads, kv_heads, ids, heads).compile()
