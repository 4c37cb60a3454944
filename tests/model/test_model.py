"""The decoder: what it may see, how it starts, and that its kernels and policies agree."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.errors import InputError
from stem_jax.memory.catalogue import table_specs
from stem_jax.model.attention import attend
from stem_jax.model.layers import truncated_normal
from stem_jax.model.rotary import halves_first, pairs_first, rotary_angles, rotate
from stem_jax.tables.spec import init_table, initial_rows, stored
from stem_jax.training.blueprint import ModelDef
from tests.logical import logical_table
from tests.stem_inputs import stem_inputs

B, L, V = 2, 16, 88


@pytest.fixture(scope="module")
def small(tiny_config):
    """A model, its parameters with norms away from 1, and its table [V, S, F]."""
    config = tiny_config()
    model = ModelDef(config)
    params, rng = jax.jit(model.init)(), np.random.default_rng(0)
    params = {
        name: value * (1 + 0.2 * rng.normal(size=value.shape)) if value.ndim == 1 else value
        for name, value in params.items()
    }
    table = rng.normal(size=(V, 2, 48)).astype(np.float32)
    return config, model, jax.tree.map(np.float32, params), table


def _inputs(tokens, segment_ids=None, positions=None, inverse=None):
    tokens = jnp.asarray(tokens, jnp.int32)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens)
    inverse = tokens if inverse is None else inverse
    return stem_inputs(tokens, inverse, jnp.asarray(positions), jnp.asarray(segment_ids))


def _logits(model, params, inputs, table):
    module = model.bind(params)
    return module.logits(module(inputs, {"stem": stored(table)})[0])


_run = jax.jit(_logits, static_argnums=0)


def _random_tokens(seed, shape=(B, L)):
    return np.random.default_rng(seed).integers(0, V, shape, dtype=np.int32)


# --- What a position sees ---


def test_no_gradient_from_the_future(small):
    """Logits at t have gradients from all embeddings and rows up to t, and from no others."""
    _, model, params, table = small
    # All tokens distinct, so a row of the embedding or the table is one position.
    tokens = np.random.default_rng(3).permutation(V)[:L][None].astype(np.int32)
    inputs = _inputs(tokens)

    @jax.jit
    def sensitivity(params, table, place):
        def picked(embedding, table):
            logits = _logits(model, {**params, "embed.weight": embedding}, inputs, table)
            return jnp.sum(logits[0, place] * jnp.arange(V))

        return jax.grad(picked, argnums=(0, 1))(params["embed.weight"], table)

    for place in (0, 5, L - 1):
        for gradient in sensitivity(params, jnp.asarray(table), place):
            reached = np.abs(np.asarray(gradient)[tokens[0]]).reshape(L, -1).sum(axis=1) > 0
            np.testing.assert_array_equal(reached, np.arange(L) <= place)


def test_a_document_does_not_see_its_neighbours(small):
    _, model, params, table = small
    document, length = _random_tokens(1, (1, 6)), 6
    alone = _run(model, params, _inputs(document), table)[0]
    for first in (0, 4, L - length):
        for seed in (2, 3):
            tokens = _random_tokens(seed, (1, L))
            tokens[:, first : first + length] = document
            segments = np.repeat([1, 2, 3], [first, length, L - first - length])
            places = np.concatenate([np.arange(first), np.arange(length), np.arange(L - first - 6)])
            packed = _inputs(tokens, segments[None].astype(np.int32), places[None].astype(np.int32))
            logits = _run(model, params, packed, table)[0, first : first + length]
            np.testing.assert_allclose(logits, alone, rtol=0, atol=2e-5)


def test_stem_layers_read_their_own_slice_of_the_row(small):
    _, model, params, table = small
    tokens = _random_tokens(4)
    logits = _run(model, params, _inputs(tokens), table)
    swapped = _run(model, params, _inputs(tokens), table[:, ::-1])
    assert np.max(np.abs(logits - swapped)) > 1e-2
    # The index is into the block, in whatever order the block comes.
    order = np.random.default_rng(0).permutation(V)
    inputs = _inputs(tokens, inverse=np.argsort(order)[tokens].astype(np.int32))
    np.testing.assert_array_equal(_run(model, params, inputs, table[order]), logits)


# --- The start ---


def _spread(values, std, cut):
    """A normal of `std` cut at +-`cut`: mean 0, its standard deviation, none beyond the cut."""
    values = np.asarray(values, np.float64).ravel()
    a = cut / std
    density = np.exp(-(a**2) / 2) / np.sqrt(2 * np.pi)
    inside = 1 - 2 * (1 - _normal_cdf(a))
    expected = std * np.sqrt(1 - 2 * a * density / inside)
    assert abs(values.mean()) < 5 * expected / np.sqrt(values.size)
    # The standard error of a standard deviation is about std / sqrt(2 n).
    assert values.std() == pytest.approx(expected, rel=5 / np.sqrt(2 * values.size))
    assert np.abs(values).max() <= cut * (1 + 1e-6)
    assert np.abs(values).max() > min(0.8 * cut, 3 * std)


def _normal_cdf(x):
    return float(jax.scipy.stats.norm.cdf(x))


FACTORS = {
    "disabled": lambda layer: 1.0,
    "current_depth": lambda layer: np.sqrt(2 * (layer + 1)),
    "global_depth": lambda layer: np.sqrt(2 * (2 + 1)),
    "dim_ratio": lambda layer: 128 / 4096,
}


@pytest.mark.parametrize("base_std", [None, 0.05])
@pytest.mark.parametrize("factor", sorted(FACTORS))
def test_initial_parameters(factor, base_std, tiny_config):
    D, F = 128, 192
    config = tiny_config(
        **{
            "model.embed_dim": D,
            "model.ffn_dim": F,
            "model.num_layers": 2,
            "model.stem_layers": (1,),
            "model.init_std_factor": factor,
            "model.init_base_std": base_std,
        }
    )
    params = ModelDef(config).init()
    std, out_std = base_std or D**-0.5, base_std or F**-0.5
    for layer in (0, 1):
        divisor, block = FACTORS[factor](layer), f"blocks.{layer}."
        inward = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "ffn.gate_proj"]
        for name in inward + ["ffn.up_proj"] * (layer == 0):
            _spread(params[f"{block}{name}.kernel"], std, 3 * std)
        # As published: the cut of down_proj is divided by the factor, that of o_proj is not.
        _spread(params[f"{block}attention.o_proj.kernel"], std / divisor, 3 * std)
        _spread(params[f"{block}ffn.down_proj.kernel"], out_std / divisor, 3 * out_std / divisor)
        assert np.all(params[f"{block}attention_norm.scale"] == 1)
    assert "blocks.1.ffn.up_proj.kernel" not in params
    for name in ("embed.weight", "head.kernel"):
        _spread(params[name], D**-0.5, 3 * D**-0.5)
    assert not np.array_equal(params["embed.weight"], params["head.kernel"])


def test_truncated_normal_at_a_tight_cut():
    _spread(truncated_normal(jax.random.key(0), (20000,), 2.0, 1.0, ("norm",)), 2.0, 1.0)


def test_initial_rows(tiny_config):
    spec = table_specs(tiny_config())["stem"]
    rows = np.asarray(initial_rows(spec, jax.random.key(0), jnp.arange(spec.num_rows)))
    xavier = np.sqrt(2 / (V + 48))
    assert rows.shape == (96, 2, 48) and abs(rows.mean()) < 5 * xavier / np.sqrt(rows.size)
    assert rows.std() == pytest.approx(xavier, rel=5 / np.sqrt(2 * rows.size))
    own = table_specs(tiny_config(**{"tables.init_std": 0.5}))["stem"]
    np.testing.assert_allclose(
        initial_rows(own, jax.random.key(0), jnp.arange(96)), rows * 0.5 / xavier, rtol=1e-5
    )
    # A row depends on its number alone, not on which others are asked for.
    some = initial_rows(spec, jax.random.key(0), jnp.array([90, 3]))
    np.testing.assert_allclose(some, rows[[90, 3]], rtol=1e-6)
    assert len(np.unique(rows)) > 0.99 * rows.size


def test_initial_table_does_not_depend_on_the_mesh(tiny_config, device_mesh):
    spec = table_specs(tiny_config())["stem"]
    alone, spread = (
        init_table(spec, jax.random.key(1), device_mesh(shape)) for shape in [(1, 1, 1), (2, 2, 2)]
    )
    alone, spread = (logical_table(table) for table in (alone, spread))
    for name, array in alone.items():
        np.testing.assert_array_equal(spread[name], array, err_msg=name)


# --- Rotary positions ---


def _rotated(x, places, theta=100.0):
    config = types.SimpleNamespace(
        head_dim=x.shape[-1], rope_theta=theta, rope_scaling="none", rope_factor=1.0
    )
    return rotate(x, rotary_angles(jnp.asarray(places)[None], config))


def test_rotation_keeps_norms_and_leaves_the_first_position():
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
    turned = _rotated(x, jnp.arange(5))
    np.testing.assert_allclose(turned[:, 0], x[:, 0], rtol=1e-6)
    pairs, turned_pairs = (np.asarray(a).reshape(1, 5, 2, 2, 4) for a in (x, turned))
    np.testing.assert_allclose(
        np.linalg.norm(turned_pairs, axis=3), np.linalg.norm(pairs, axis=3), rtol=1e-5
    )
    assert np.max(np.abs(turned[:, 1:] - x[:, 1:])) > 0.1


def test_rotation_is_complex_multiplication_of_halves():
    x = jax.random.normal(jax.random.key(1), (1, 3, 1, 8))
    places, theta = np.array([0, 7, 1000]), 100.0
    z = np.asarray(x)[..., :4] + 1j * np.asarray(x)[..., 4:]
    frequencies = theta ** (-2 * np.arange(4) / 8)
    z = z * np.exp(1j * places[:, None, None] * frequencies)
    turned = np.asarray(_rotated(x, places, theta))
    np.testing.assert_allclose(turned, np.concatenate([z.real, z.imag], axis=-1), atol=1e-4)


def test_columns_of_adjacent_pairs_become_halves_and_back():
    kernel = np.arange(2 * 16).reshape(2, 16)
    halves = halves_first(kernel, 2)
    assert halves[0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    np.testing.assert_array_equal(pairs_first(halves, 2), kernel)


def test_scores_depend_on_the_distance_alone():
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 8)) for i in (2, 3))
    score = [
        float(jnp.sum(_rotated(q, [place + 4]) * _rotated(k, [place]))) for place in (0, 9, 50)
    ]
    np.testing.assert_allclose(score, score[0], atol=1e-4)
    assert abs(score[0] - float(jnp.sum(_rotated(q, [5]) * _rotated(k, [0])))) > 1e-3


# --- Attention kernels ---


def _attention_inputs(L, H, K, Dh):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (2, L, heads, Dh))
        for key, heads in zip(keys, (H, K, K), strict=True)
    )
    places = np.arange(L)
    segments = np.stack([1 + (places >= L // 3), np.where(places < L - 20, 1, 0)])
    return q, k, v, jnp.asarray(segments, jnp.int32)


def _attention_oracle(q, k, v, segments):
    """Softmax over the same document's past, float64, query head h with KV head h // (H / K)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("blhd,bthd->bhlt", q, k) / np.sqrt(q.shape[-1])
    places, segments = np.arange(q.shape[1]), np.asarray(segments)
    allowed = (places <= places[:, None]) & (segments[:, :, None] == segments[:, None])
    scores = np.where(allowed[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhlt,bthd->blhd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (4, 1)])
def test_grouped_heads_equal_repeated_ones(H, K):
    q, k, v, segments = _attention_inputs(24, H, K, 8)
    out = attend(q, k, v, segments, "xla", None)
    np.testing.assert_allclose(out, _attention_oracle(q, k, v, segments), atol=2e-6)
    repeated = [jnp.repeat(x, H // K, axis=2) for x in (k, v)]
    np.testing.assert_allclose(out, attend(q, *repeated, segments, "xla", None), atol=2e-6)


@pytest.mark.parametrize("K", [2, 1])
def test_splash_equals_xla(K, device_mesh):
    # Interpreted off TPU. Lengths and head sizes in multiples of 128 lanes, as on the chip.
    q, k, v, segments = _attention_inputs(256, 2, K, 128)

    def outputs(backend, mesh):
        def loss(q, k, v):
            out = attend(q, k, v, segments, backend, mesh)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    gradients, expected = outputs("xla", None)
    for mesh in (None, device_mesh((2, 1, 1))):
        found_gradients, found = outputs("splash", mesh)
        np.testing.assert_allclose(found, expected, atol=5e-6)
        for one, other in zip(found_gradients, gradients, strict=True):
            np.testing.assert_allclose(one, other, atol=5e-5)


def test_cudnn_needs_a_gpu(tiny_config):
    with pytest.raises(
        InputError, match=r"model.attention=cudnn needs a GPU, this is cpu; use auto"
    ):
        ModelDef(tiny_config(**{"model.attention": "cudnn"}))


# --- Rematerialisation ---


def _kept_for_backward(loss, *args) -> int:
    """Bytes of activations that the backward pass waits for: what its closure holds."""
    residuals = jax.eval_shape(lambda *args: jax.vjp(loss, *args)[1], *args)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(residuals))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_remat_keeps_less_for_the_backward_pass(scan, small, tiny_config):
    """Per layer, so that the embedding and the head do not count."""
    _, _, _, table = small
    kept = {}
    for policy in ("none", "full", "attention", "dots"):
        layers = {}
        for number in (4, 8):
            config = tiny_config(
                **{
                    "model.remat": policy,
                    "model.num_layers": number,
                    "model.stem_layers": "none",
                    "model.scan_layers": scan,
                }
            )
            model = ModelDef(config)
            inputs = _inputs(_random_tokens(5))

            def loss(params, model=model, inputs=inputs):
                return jnp.sum(_logits(model, params, inputs, table))

            params = model.shapes()
            size = sum(p.size * p.dtype.itemsize for p in params.values())
            layers[number] = _kept_for_backward(loss, params) - size
        kept[policy] = (layers[8] - layers[4]) / 4
    stream = 4 * B * L * config.model.embed_dim
    # The input of the block; it and what the seven projections gave; every step on the way but
    # those of the gated product, which its backward pass makes from what it multiplied.
    assert kept["full"] == stream
    # What attention gave is as wide as the stream here.
    assert kept["attention"] == 2 * stream
    assert stream < kept["dots"] <= 8 * stream
    assert kept["none"] > 16 * stream


def test_remat_changes_memory_not_gradients(small, tiny_config):
    _, _, params, table = small
    inputs, targets = _inputs(_random_tokens(5)), _random_tokens(6)
    results, forward_matmuls = {}, {}
    for policy in ("none", "full", "attention", "dots", "offload"):
        model = ModelDef(tiny_config(**{"model.remat": policy}))

        def loss(params, table, model=model):
            log_p = jax.nn.log_softmax(_logits(model, params, inputs, table))
            return -jnp.mean(jnp.take_along_axis(log_p, targets[..., None], axis=-1))

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        results[policy] = run(params, table)
        forward_matmuls[policy] = run.lower(params, table).as_text().count("dot_general")
    # Each policy is a program of its own: the more is computed again, the more matmuls.
    assert forward_matmuls["full"] > forward_matmuls["dots"] > forward_matmuls["none"]
    for policy in ("full", "attention", "dots", "offload"):
        for one, other in zip(
            jax.tree.leaves(results[policy]), jax.tree.leaves(results["none"]), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
