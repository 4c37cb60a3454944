"""Heads over the tensor axis, and what each attention kernel takes, before anything is compiled."""

import importlib.util
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.config_file import config_from_json
from stem_jax.errors import InputError
from stem_jax.model.attention import attend, resolve_backend
from stem_jax.planning.program import train_step_program
from stem_jax.run_checks import check_documents, check_mesh
from stem_jax.training.blueprint import ModelDef
from stem_jax.training.schedule import make_schedule
from stem_jax.training.start_report import attention_kernel
from stem_jax.training.state import init_state


class StandIn:
    """A mesh as far as it is asked here: of a platform that this machine has not."""

    def __init__(self, platform: str, tensor: int = 1, capability: str = "9.0", context: int = 1):
        self.shape = {"data": 1, "fsdp": 1, "context": context, "tensor": tensor}
        found = {"platform": platform, "compute_capability": capability}
        self.devices = np.array([type("Device", (), found)()])


@pytest.fixture(autouse=True)
def _tokamax(monkeypatch):
    """As if it were installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: "tokamax" if name == "tokamax" else find(name)
    )


HEADS = [
    ((6, 2), 4, "model.num_heads=6 does not divide over mesh.tensor=4: each device computes whole"),
    ((6, 3), 2, "model.num_kv_heads=3 neither divides over mesh.tensor=2 nor divides it"),
    ((12, 3), 4, "model.num_kv_heads=3 neither divides over mesh.tensor=4 nor divides it"),
]


def heads(config_of, H: int, K: int, **keys):
    sizes = {"num_heads": H, "num_kv_heads": K, "embed_dim": 8 * H, "ffn_dim": 48}
    return config_of(**{f"model.{key}": value for key, value in sizes.items()}, **keys)


@pytest.mark.parametrize(("numbers", "tensor", "message"), HEADS)
@pytest.mark.parametrize(
    ("platform", "kernel"), [("cpu", "xla"), ("gpu", "tokamax"), ("tpu", "splash")]
)
def test_heads_that_would_be_cut_are_refused(
    numbers, tensor, message, platform, kernel, tiny_config
):
    keys = {"train.seq_len": 128, "model.compute_dtype": "bfloat16"}
    config, mesh = heads(tiny_config, *numbers, **keys), StandIn(platform, tensor)
    assert resolve_backend(config.model, mesh, 128) == kernel
    with pytest.raises(InputError, match=re.escape(message)):
        check_mesh(config, mesh)
    check_mesh(config, StandIn(platform, 1))
    # A run that an earlier version began with xla goes on, but where devices would share a KV head
    # and the queries do not divide over them; with the others it never began.
    if kernel == "xla" and numbers != (6, 2):
        check_mesh(config, mesh, under_way=True)
    else:
        with pytest.raises(InputError, match=re.escape(message)):
            check_mesh(config, mesh, under_way=True)


def test_a_plan_refuses_them_too(tiny_config, device_mesh):
    config = heads(tiny_config, 6, 2, **{"train.global_batch_size": 2})
    with pytest.raises(InputError, match=r"num_heads=6 does not divide over mesh\.tensor=4"):
        train_step_program(config, device_mesh((1, 2, 4)))


@pytest.mark.parametrize(
    ("platform", "keys", "message"),
    [
        ("tpu", {"model.attention": "splash", "train.seq_len": 100}, "of 100 tokens (train.seq_l"),
        ("tpu", {"model.attention": "splash", "train.seq_len": 200}, "only multiples of 128; chan"),
        ("gpu", {"model.attention": "cudnn", "train.seq_len": 33}, "of 33 tokens (train.seq_len)"),
        ("gpu", {"model.attention": "cudnn", "model.head_dim": 12}, "model.head_dim=12, only mult"),
        ("gpu", {"model.attention": "tokamax", "train.seq_len": 64}, "only multiples of 128; chan"),
        ("gpu", {"model.attention": "tokamax", "model.head_dim": 264}, "only multiples of 8 up to"),
        (
            "gpu",
            {"model.attention": "cudnn", "model.compute_dtype": "float32"},
            "takes no model.compute_dtype=float32, only bfloat16; change it, or use auto",
        ),
        ("cpu", {"model.attention": "cudnn"}, "model.attention=cudnn needs a GPU, this is cpu"),
        (
            "gpu",
            {"model.attention": "splash"},
            "model.attention=splash needs a TPU, this is gpu; use",
        ),
    ],
)
def test_what_a_kernel_does_not_take_is_refused(platform, keys, message, tiny_config):
    config = tiny_config(**{"model.compute_dtype": "bfloat16", **keys})
    with pytest.raises(InputError, match=re.escape(message)):
        check_mesh(config, StandIn(platform))


@pytest.mark.parametrize(
    ("platform", "length", "dtype", "kernel"),
    [
        ("tpu", 256, "float32", "splash"),
        ("tpu", 200, "float32", "chunked"),
        ("gpu", 256, "bfloat16", "tokamax"),
        ("gpu", 200, "bfloat16", "chunked"),
        ("gpu", 256, "float32", "chunked"),
        ("cpu", 256, "bfloat16", "xla"),
    ],
)
def test_auto_takes_a_kernel_that_takes_the_length(platform, length, dtype, kernel, tiny_config):
    config = tiny_config(**{"model.compute_dtype": dtype, "train.seq_len": length})
    check_mesh(config, StandIn(platform))
    assert resolve_backend(config.model, StandIn(platform), length) == kernel


@pytest.mark.parametrize(
    ("platform", "length", "kernel"),
    [
        ("tpu", 512, "splash"),
        ("tpu", 384, "chunked"),
        ("gpu", 512, "tokamax"),
        ("gpu", 384, "chunked"),
        ("cpu", 384, "xla"),
    ],
)
def test_each_device_along_context_has_whole_blocks(platform, length, kernel, tiny_config):
    config = tiny_config(**{"model.compute_dtype": "bfloat16", "train.seq_len": length})
    mesh = StandIn(platform, context=4)
    check_mesh(config, mesh)
    assert resolve_backend(config.model, mesh, length) == kernel


def test_cudnn_knows_no_queries_in_the_midst_of_a_sequence(tiny_config):
    config = tiny_config(**{"model.compute_dtype": "bfloat16", "model.attention": "cudnn"})
    with pytest.raises(
        InputError,
        match=r"attention=cudnn takes no mesh\.context=2, only 1.*; change it, or use auto",
    ):
        check_mesh(config, StandIn("gpu", context=2))


def test_a_cpu_says_that_it_interprets_the_kernel_of_tpus(tiny_config):
    config = tiny_config(**{"model.attention": "splash", "train.seq_len": 128})
    assert attention_kernel(config, StandIn("tpu")) == "splash"
    assert attention_kernel(config, StandIn("cpu")).startswith("splash: interpreted, as it is a")


def test_a_gpu_without_the_kernels_goes_in_chunks(tiny_config, monkeypatch):
    keys = {"model.compute_dtype": "bfloat16", "train.seq_len": 256}
    auto, named = tiny_config(**keys), tiny_config(**keys, **{"model.attention": "tokamax"})
    for capability in ("8.6", "gfx942"):
        other = StandIn("gpu", capability=capability)
        assert resolve_backend(auto.model, other, 256) == "chunked"
        with pytest.raises(InputError, match=f"tokamax has no kernels for .* {capability}, only"):
            check_mesh(named, other)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert resolve_backend(auto.model, StandIn("gpu"), 256) == "chunked"
    with pytest.raises(
        InputError, match=r"tokamax is not installed \(pip install \"tokamax<0\.1\"\)"
    ):
        check_mesh(named, StandIn("gpu"))


@pytest.mark.parametrize(("K", "spec"), [(1, None), (2, None), (4, "tensor"), (8, "tensor")])
def test_few_kv_heads_are_whole_on_every_device(K, spec, tiny_config, device_mesh):
    specs = ModelDef(heads(tiny_config, 8, K), device_mesh((1, 2, 4))).specs()
    for name in ("k_proj", "v_proj"):
        assert tuple(specs[f"blocks.0.attention.{name}.kernel"]) == ("fsdp", spec)
    assert tuple(specs["blocks.0.attention.q_proj.kernel"]) == ("fsdp", "tensor")
    assert all("tensor" in spec or None in spec for spec in map(tuple, specs.values()))


@pytest.mark.parametrize(
    ("backend", "K", "Dh"),
    [("xla", 1, 64), ("chunked", 2, 8), ("splash", 1, 64), ("splash", 2, 96), ("splash", 4, 64)],
)
def test_kernels_over_tensor_equal_one_device(backend, K, Dh, device_mesh):
    """Head sizes off the 128 lanes of a chip too: the shipped models have 64."""
    H, L = 8, 128
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (2, L, n, Dh)) for key, n in zip(keys, (H, K, K), strict=True)
    )
    segments = jnp.asarray(np.stack([1 + (np.arange(L) > 50), np.arange(L) < 100]), jnp.int32)
    mesh = device_mesh((1, 2, 4))

    def outputs(backend, mesh):
        def loss(q, k, v):
            out = attend(q, k, v, segments, backend, mesh)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (gradients, expected), (found_gradients, found) = outputs("xla", None), outputs(backend, mesh)
    np.testing.assert_allclose(found, expected, atol=5e-6)
    for one, other in zip(found_gradients, gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-5)


@pytest.mark.long
def test_one_kv_head_trains_on_two_devices_as_on_one(train_step, make_batch):
    """And its projection, whole on both, stays the same on both."""
    states = []
    for shape in ((1, 1, 1), (1, 1, 2)):
        step = train_step(shape, **{"model.num_kv_heads": 1})
        state = init_state(step.blueprint)
        schedule = make_schedule(step.config, 3, np.full(3, 3e-3))
        for seed in range(3):
            state, _ = step.update(state, make_batch(step, seed=seed), schedule)
        states.append(state)
    for name, value in states[0].params.items():
        np.testing.assert_allclose(states[1].params[name], value, atol=1e-5, err_msg=name)
    one, other = states[1].params["blocks.1.attention.k_proj.kernel"].addressable_shards
    np.testing.assert_array_equal(one.data, other.data)


def test_a_config_with_such_heads_is_read(tiny_config):
    """Checkpoints are read on any mesh: only a training asks for one."""
    config = heads(tiny_config, 6, 2, **{"mesh.tensor": 4, "train.seq_len": 100})
    assert config_from_json(config.to_json()) == config


def test_cudnn_trains_on_rows_of_one_document_alone(tiny_config):
    """Refused where a training starts, of what it validates with as well."""

    def data(packed, held_out=None):
        def rows(row):
            store = SimpleNamespace(meta=SimpleNamespace(name=f"text of {row}"))
            return SimpleNamespace(store=store, packed_row=lambda: row)

        batches = SimpleNamespace(rows=(rows(None), rows(packed)))
        return SimpleNamespace(batches=batches, held_out=SimpleNamespace(rows=(rows(held_out),)))

    keys = {"model.compute_dtype": "bfloat16", "train.seq_len": 128}
    cudnn, gpu = tiny_config(**keys, **{"model.attention": "cudnn"}), StandIn("gpu")
    check_documents(cudnn, gpu, data(None))
    check_documents(tiny_config(**keys), gpu, data(7))
    for other in (data(7), data(None, 7)):
        with pytest.raises(InputError) as refused:
            check_documents(cudnn, gpu, other)
        assert str(refused.value) == (
            "model.attention=cudnn attends over whole rows, and row 7 of 128 tokens "
            "(train.seq_len) of 'text of 7' (data.sources) holds several documents; set "
            "model.attention to auto, or train on rows of one document each"
        )
