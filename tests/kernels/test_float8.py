"""Projections in numbers of 8 bits: how near they come, what the programs multiply, who refuses."""

import collections
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stem_jax.checkpoints.loading import checkpoint_fingerprints
from stem_jax.errors import InputError
from stem_jax.goodput.progress import Progress
from stem_jax.hardware import Chip
from stem_jax.kernels import float8
from stem_jax.model.cost import training_flops_per_token
from stem_jax.planning.program import train_step_program
from stem_jax.processes.start_clock import StartClock
from stem_jax.run_checks import check_mesh
from stem_jax.training import loop
from stem_jax.training.blueprint import ModelDef
from stem_jax.training.metrics import MetricsLog
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import init_state
from tests.model.test_attention_heads import StandIn
from tests.stem_inputs import stem_inputs

pytest.importorskip("qwix")
STEPS = 50


@pytest.mark.parametrize("output_first", [False, True])
def test_products_and_gradients_are_near(output_first):
    """Within what rounding to three bits of mantissa may change a number, and to two: gradients."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 24, 32)) * 10.0 ** jnp.arange(-3, 5).repeat(6)[:24, None]
    kernel = jax.random.normal(keys[1], (48, 32) if output_first else (32, 48)) * 1e-3
    gradient = jax.random.normal(keys[2], (2, 24, 48)) * 1e-6

    def exact(x, kernel):
        return x @ (kernel.T if output_first else kernel)

    results = []
    for function in (lambda *args: float8.project(*args, output_first), exact):
        out, pull = jax.vjp(function, x, kernel)
        results.append([out, *pull(gradient)])
    for found, right, most in zip(*results, (1 / 16, 1 / 8, 1 / 8), strict=True):
        assert found.shape == right.shape and found.dtype == right.dtype
        # Of each position alone: their sizes differ by eight orders of magnitude.
        error, size = (np.linalg.norm(np.asarray(a), axis=-1) for a in (found - right, right))
        assert 0 < np.max(error / size) < most


@pytest.mark.long
def test_the_loss_after_fifty_steps_is_that_of_bfloat16(train_step, make_batch):
    """A STEM and a dense block; of one batch, so that there is something to learn."""
    sizes = {"model.num_layers": 2, "model.stem_layers": (1,), "model.compute_dtype": "bfloat16"}
    losses = {}
    for kind in (None, "float8"):
        step = train_step(**sizes, **{"model.matmul_dtype": kind, "train.steps": STEPS})
        schedule = make_schedule(step.config, STEPS, np.full(STEPS, 3e-3))
        state, batch, found = init_state(step.blueprint), make_batch(step), []
        for _ in range(STEPS):
            state, metrics = step.update(state, batch, schedule)
            found.append(float(metrics["loss"]))
        losses[kind] = found
    print({kind: (found[0], found[-1]) for kind, found in losses.items()})
    assert losses["float8"] != losses[None]
    fallen = losses[None][0] - losses[None][-1]
    assert fallen > 1 and abs(losses["float8"][-1] - losses[None][-1]) < 0.05 * fallen


def test_every_projection_multiplies_eight_bits(tiny_config):
    """In the program for a GPU: 7 of a dense block and 6 of a STEM block, three times each."""
    keys = {"num_layers": 2, "stem_layers": (1,), "compute_dtype": "bfloat16"}
    keys |= {"attention": "xla", "matmul_dtype": "float8"}
    model = ModelDef(tiny_config(**{f"model.{key}": value for key, value in keys.items()}))
    ones, rows = jnp.ones((1, 16), jnp.int32), jnp.ones((1, 4, 48), jnp.bfloat16)
    inputs = stem_inputs(ones, ones, jnp.arange(16)[None], ones)

    def loss(params):
        return jnp.sum(model.bind(params)(inputs, {"stem": rows}).hidden.astype(jnp.float32))

    traced = jax.jit(jax.grad(loss)).trace(model.shapes())
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    pairs = re.findall(r"dot_general .* : \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)", text)
    found = collections.Counter(tuple(sorted(pair)) for pair in pairs)
    assert found["f8E4M3FN", "f8E4M3FN"] == 13 and found["f8E4M3FN", "f8E5M2"] == 26


@pytest.mark.parametrize(
    ("platform", "capability", "words"),
    [
        ("tpu", "", "needs a GPU, this is tpu; set it to none"),
        ("gpu", "8.0", "needs compute capability 8.9, this GPU has 8.0"),
        ("gpu", "gfx942", "needs compute capability 8.9, this GPU has gfx942"),
        ("gpu", "9.0", None),
        ("gpu", "10.0", None),
        ("cpu", "", None),
    ],
)
def test_devices_without_such_products_are_refused(platform, capability, words, tiny_config):
    keys = {"model.matmul_dtype": "float8", "model.attention": "auto", "train.seq_len": 128}
    config, mesh = tiny_config(**keys), StandIn(platform, 1, capability)
    if words is None:
        return check_mesh(config, mesh)
    with pytest.raises(InputError, match=f"model.matmul_dtype=float8 {words}"):
        check_mesh(config, mesh)


def test_without_the_library_it_says_how_to_get_it(tiny_config, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'float8 needs qwix \(pip install "qwix<0.2"\); set it'):
        check_mesh(tiny_config(**{"model.matmul_dtype": "float8"}), StandIn("cpu"))


def test_a_plan_refuses_them_as_a_run_does(tiny_config, device_mesh, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = tiny_config(**{"model.matmul_dtype": "float8"})
    with pytest.raises(
        InputError, match=r"model\.matmul_dtype=float8 needs qwix .*; set it to none"
    ):
        train_step_program(config, device_mesh((1, 1, 1)))


def test_a_checkpoint_is_the_same_however_it_was_multiplied(tiny_config):
    """So a patch made before this key was there still knows its run."""
    tokenizer = type("Tokenizer", (), {"fingerprint": "x"})()
    norm = np.ones(4, np.float32)
    configs = [tiny_config(**{"model.matmul_dtype": kind}) for kind in (None, "float8")]
    one, other = (checkpoint_fingerprints(config, 1, tokenizer, norm) for config in configs)
    assert one == other


def test_a_run_states_its_share_of_the_peak_of_eight_bits(tiny_config, monkeypatch, tmp_path):
    chip = Chip("X", 1e12, 1, 1, 1, 1, 1, "a test", float8=2e12)
    monkeypatch.setattr(loop, "chip_of", lambda device: chip)
    shares = {}
    for kind in (None, "float8"):
        config, log = tiny_config(**{"model.matmul_dtype": kind}), MetricsLog(tmp_path, 0)
        reporter = loop._Reporter(config, log, StartClock(), 4, 0, Progress())
        reporter._write(1, {}, seconds=0.5, tokens_per_second=1e6)
        shares[kind] = log.records[-1]["train/mfu"]
        reporter.close()
        log.close()
    flops = 1e6 * training_flops_per_token(config, config.train.seq_len)
    assert shares == {None: flops / 4e12, "float8": flops / 8e12}
