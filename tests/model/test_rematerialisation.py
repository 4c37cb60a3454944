"""What layers keep for their backward pass, in programs: what attention gave, on device or host."""

import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from jax.sharding import Mesh

from stem_jax.errors import InputError
from stem_jax.kernels.document_attention import document_attention
from stem_jax.kernels.kept_names import attention
from stem_jax.mesh import make_mesh, replicated
from stem_jax.model.inputs import Inputs
from stem_jax.planning import gpus
from stem_jax.planning.plan import make_plan
from stem_jax.planning.plan_text import as_json, as_text
from stem_jax.planning.topology import Topology
from stem_jax.run_checks import check_mesh
from stem_jax.training.blueprint import ModelDef
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import init_state
from tests.model.test_attention_heads import StandIn

LITTLE_EFFORT = {"exec_time_optimization_effort": -1.0}
POLICIES = jax.checkpoint_policies


def _gradients(tiny_config, length: int, mesh: Mesh | None = None, **model):
    """The function of a dense layer's parameters that gives their gradients, and its argument."""
    keys = {"num_layers": 1, "stem_layers": "none", "num_heads": 2, "num_kv_heads": 1} | model
    config = tiny_config(
        **{f"model.{key}": value for key, value in keys.items()}, **{"train.seq_len": length}
    )
    model = ModelDef(config, mesh)
    ones = np.ones((1, length), np.int32)
    inputs = Inputs(ones, np.arange(length, dtype=np.int32)[None], ones)

    def loss(params):
        hidden = model.bind(params)(inputs, {}).hidden
        # Square: the forward pass cannot be left out.
        return jnp.sum(jnp.square(hidden.astype(jnp.float32)))

    place = None if mesh is None else replicated(mesh)
    params = {
        name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)
        for name, shape in model.shapes().items()
    }
    return jax.jit(jax.value_and_grad(loss)), params


def test_chunks_of_attention_are_not_computed_again(tiny_config):
    """On CPUs, in the optimised program: a loop over chunks forward, one backward, none between."""
    loops = {}
    for policy in ("none", "full", "attention", "dots"):
        function, params = _gradients(tiny_config, 128, attention="chunked", remat=policy)
        loops[policy] = function.lower(params).compile().as_text().count(" while(")
    assert loops["attention"] == loops["none"]
    assert loops["full"] == loops["dots"] == loops["none"] + 1


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: no TPU compiler"
)
def test_the_kernel_of_tpus_does_not_run_again(tiny_config):
    """In the program for one: it runs forward, and then only the kernels of the way back."""
    device = Topology.parse("v5e:2x2").devices()[0]
    mesh = make_mesh(tiny_config().mesh, [device])
    sizes = {"attention": "splash", "embed_dim": 128, "head_dim": 64, "vocab_size": 128}
    calls = {}
    for policy in ("full", "attention"):
        function, params = _gradients(tiny_config, 128, mesh, **sizes, remat=policy)
        text = function.lower(params).compile(compiler_options=LITTLE_EFFORT).as_text()
        kernels = re.findall(r"custom-call\(.*tpu_custom_call.*op_name=\"([^\"]*)\"", text)
        calls[policy] = sum("splash_forward" in name for name in kernels)
    assert calls == {"full": 2, "attention": 1}


def _kernels(jaxpr) -> int:
    """Kernels in a program and all that it calls."""
    found = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("pallas_call", "core_map", "mpmd_map"):
            found += 1
            continue
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            found += _kernels(inner) if hasattr(inner, "eqns") else 0
    return found


def test_the_kernel_of_gpus_does_not_run_again(monkeypatch):
    pytest.importorskip("tokamax")
    from tokamax._src import gpu_utils
    from tokamax._src.ops import op

    monkeypatch.setattr(gpu_utils, "_compute_capability", lambda device=None: 9.0)
    monkeypatch.setattr(gpu_utils, "has_mosaic_gpu_support", lambda device=None: True)
    monkeypatch.setattr(op.Op, "supported_on", lambda self, device: True)
    heads = [jax.ShapeDtypeStruct((2, 384, 4, 64), jnp.bfloat16)] * 3

    def kernels(policy) -> int:
        def block(q, k, v):
            segments = jnp.ones(q.shape[:2], jnp.int32)
            out = attention(document_attention(*map(jnp.tanh, (q, k, v)), segments))
            return jnp.square(out.astype(jnp.float32))

        def loss(*heads):
            return jnp.sum(jax.checkpoint(block, policy=policy)(*heads))

        # The value, too: its forward pass cannot be left out.
        function = jax.value_and_grad(loss, argnums=(0, 1, 2))
        closed = jax.make_jaxpr(function)(*heads)
        return _kernels(jax.interpreters.partial_eval.dce_jaxpr(closed.jaxpr, [True] * 4)[0])

    full, kept = (
        kernels(POLICIES.nothing_saveable),
        kernels(POLICIES.save_only_these_names("attention")),
    )
    assert (full, kept) == (4, 3)


def test_offloaded_results_go_to_the_hosts_memory(tiny_config):
    """In the program for a TPU; the plan counts them."""
    function, params = _gradients(tiny_config, 16, remat="offload")
    text = function.trace(params).lower(lowering_platforms=("tpu",)).as_text()
    # What attention gave, and the projections but the last, whose result nobody needs again.
    assert len(re.findall(r'_xla_buffer_placement = "pinned_host"', text)) == 7
    function, params = _gradients(tiny_config, 16, remat="dots")
    assert "pinned_host" not in function.trace(params).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(
    ("topology", "compiler"),
    [
        ("v5e:2x2", importlib.util.find_spec("libtpu") is not None),
        pytest.param("h100:1", gpus.missing() is None, marks=pytest.mark.long),
    ],
)
def test_a_plan_has_the_bytes_that_go_to_the_hosts_memory(topology, compiler, tiny_config):
    """Of one dense layer."""
    if not compiler:
        pytest.skip(f"nothing here compiles for {topology}")
    keys = {"num_layers": 1, "stem_layers": "none", "head_dim": 64, "remat": "offload"}
    keys |= {"compute_dtype": "bfloat16", "attention": "chunked"}
    config = tiny_config(
        **{f"model.{key}": value for key, value in keys.items()},
        **{"train.seq_len": 128, "mesh.data": -1},
    )
    plan = make_plan(config, Topology.parse(topology))
    # At least what attention gave in one layer: 4 heads of 64 for each position of a device.
    sequences = config.micro_batch_size // plan.chips
    assert plan.memory.host >= 2 * sequences * 128 * 4 * 64
    assert f"host {plan.memory.host / 2**20:,.1f} MiB" in as_text(plan)
    assert json.loads(as_json(plan))["memory"]["host"] == plan.memory.host


@pytest.mark.long
@pytest.mark.parametrize("policy", ["attention", "offload"])
def test_on_a_mesh_a_step_is_that_of_full(policy, train_step, make_batch):
    """Scanned groups with rows, micro-batches, all axes."""
    keys = {"model.num_layers": 4, "model.stem_layers": (1, 3), "model.scan_layers": True}
    found = []
    for kind in ("full", policy):
        step = train_step((2, 2, 2), **keys, **{"model.remat": kind, "train.micro_batches": 2})
        state = init_state(step.blueprint)
        state, metrics = step.update(state, make_batch(step), make_schedule(step.config, 2))
        mu = [*jax.tree.leaves(state.opt_state), state.tables["stem"].mu]
        found.append([metrics["loss"], metrics["grad_norm"], *mu])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("platform", "scanned", "version", "refused"),
    [
        ("gpu", True, "0.10.2", True),
        ("gpu", True, "0.11.1", True),
        ("gpu", True, "0.11.2", False),
        ("gpu", True, "0.12.0.dev20261101", False),
        ("gpu", False, "0.10.2", False),
        ("tpu", True, "0.10.2", False),
    ],
)
def test_wrong_gradients_are_refused(platform, scanned, version, refused, tiny_config, monkeypatch):
    """Of a compiler that reads offloaded residuals of a scan in the wrong order."""
    monkeypatch.setattr(jaxlib, "__version__", version)
    keys = {"model.remat": "offload", "model.scan_layers": scanned, "train.seq_len": 128}
    config, mesh = tiny_config(**keys), StandIn(platform)
    if not refused:
        return check_mesh(config, mesh)
    words = rf"model.remat=offload with model.scan_layers=True: jaxlib {version} .* 0.11.2 or newer"
    with pytest.raises(InputError, match=words):
        check_mesh(config, mesh)
