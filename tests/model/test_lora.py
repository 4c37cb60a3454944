"""Adapters beside frozen projections: they alone move, on any mesh, scanned or not, and resume."""

import dataclasses
import json
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stem_jax import export
from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.loading import load_run
from stem_jax.checkpoints.origin import begin_from, find_origin
from stem_jax.errors import InputError
from stem_jax.interop.peft_export import export_peft
from stem_jax.model.cost import count_parameters
from stem_jax.model.layer_plan import by_layer
from stem_jax.model.layers import Linear
from stem_jax.model.lora import Adapter, adapters, factors, is_of_adapters
from stem_jax.run_checks import check_first_start
from stem_jax.training.blueprint import ModelDef
from stem_jax.training.schedule import make_schedule
from stem_jax.training.state import abstract_state
from stem_jax.training.step import TrainStep
from tests.logical import logical_table
from tests.saved_models import BYTES, CONTEXT, SIZES, greedy, logits, save_run, trained_state

LORA = {"lora.rank": 3, "lora.alpha": 12.0, "optimizer.train": "backbone"}
_UPDATES = 3


@pytest.fixture(scope="module")
def base(train_step, make_batch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    step = train_step(**SIZES)
    save_run(folder, step, trained_state(step, make_batch))
    return folder


def _begun(base, train_step, shape=(1, 1, 1), **keys):
    config = {**SIZES, **LORA, **keys, "train.init_from": str(base)}
    step = train_step(shape, **{k: v for k, v in config.items() if k != "mesh.data"})
    train = dataclasses.replace(step.config.train, seq_len=CONTEXT)
    origin = find_origin(dataclasses.replace(step.config, train=train))
    return step, begin_from(origin, step)[0]


def _steps(step, state, make_batch, first=0, last=_UPDATES):
    losses = []
    for number in range(first, last):
        batch = make_batch(step, seed=100 + number)
        state, metrics = step.update(state, batch, make_schedule(step.config, 8))
        losses.append(float(metrics["loss"]))
    return state, losses


def _host(state):
    params = jax.device_get(by_layer(state.params))
    return params, logical_table(state.tables["stem"])["rows"]


def _save(folder, step, state):
    config = dataclasses.replace(
        step.config, train=dataclasses.replace(step.config.train, seq_len=CONTEXT)
    )
    BYTES.save(folder / "tokenizer")
    number = int(state.step)
    touched = {name: int(n) for name, n in state.touched_rows.items()}
    info = CheckpointInfo(number, number, 0, touched, BYTES.fingerprint, {"seed": 0}, config)
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(state, info, None)
        checkpoints.wait()


@pytest.mark.parametrize("train", ["backbone", "all"])
def test_adapters_alone_move(base, train_step, make_batch, train):
    step, state = _begun(base, train_step, **{"optimizer.train": train})
    before, rows = _host(state)
    of_base = load_run(base).params
    for name, value in of_base.items():
        np.testing.assert_array_equal(before[name], value)
    # It begins as the base: what adapters add is zero.
    ups = [before[factors(p)[1]] for p in adapters(before)]
    assert len(ups) == 3 * 6 + 1 and not any(up.any() for up in ups)
    moments = [x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == 2 * sum(map(is_of_adapters, before))
    state, _ = _steps(step, state, make_batch)
    after, rows_after = _host(state)
    for name, value in after.items():
        assert np.array_equal(value, before[name]) != is_of_adapters(name), name
    assert np.array_equal(rows, rows_after) == (train == "backbone")


@pytest.mark.long
def test_meshes_and_scans_learn_alike(base, train_step, make_batch):
    plain, losses = _steps(*_begun(base, train_step), make_batch)
    plain, _ = _host(plain)
    variants = [
        ((2, 2, 2), {}),
        ((1, 1, 1), {"model.scan_layers": True, "model.remat": "full"}),
        ((1, 1, 1), {"train.micro_batches": 2}),
    ]
    for shape, keys in variants:
        state, found = _steps(*_begun(base, train_step, shape, **keys), make_batch)
        np.testing.assert_allclose(found, losses, rtol=1e-5)
        for name, value in _host(state)[0].items():
            np.testing.assert_allclose(value, plain[name], rtol=0, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("scan", [False, True])
def test_it_resumes_bit_for_bit(base, train_step, make_batch, tmp_path, scan):
    step, state = _begun(base, train_step, **{"model.scan_layers": scan})
    state, _ = _steps(step, state, make_batch)
    _save(tmp_path, step, state)
    whole, _ = _steps(step, state, make_batch, _UPDATES, _UPDATES + 2)
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        again = checkpoints.restore(_UPDATES, abstract_state(step.blueprint))
    again, _ = _steps(step, again, make_batch, _UPDATES, _UPDATES + 2)
    assert jax.tree.structure(again) == jax.tree.structure(whole)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("output_first", [False, True])
def test_an_adapter_is_a_sum_in_every_layout(output_first):
    shape, axes = (6, 5), ("embed", "heads")
    linear = Linear(shape, axes, 1.0, 3.0, rngs=nnx.Rngs(params=0), output_first=output_first)
    inputs = shape[1] if output_first else shape[0]
    adapter = Adapter(linear, 2, 0.5, "blocks.0.attention.q_proj", 7)
    down, up = adapter.down.get_value(), adapter.up.get_value()
    assert down.shape == (inputs, 2) and not up.any()
    assert 0 < jnp.abs(down).max() <= inputs**-0.5
    adapter.up.set_value(jax.random.normal(jax.random.key(1), up.shape))
    x_BxLxI = jax.random.normal(jax.random.key(2), (3, 4, inputs))
    kernel = linear.kernel.get_value()
    kernel_IxO = kernel.T if output_first else kernel
    whole = kernel_IxO + 0.5 * adapter.down.get_value() @ adapter.up.get_value()
    linear.adapter = adapter
    expected = np.asarray(x_BxLxI @ whole)
    np.testing.assert_allclose(linear(x_BxLxI), expected, rtol=1e-5, atol=1e-5)
    if output_first:
        return
    found = linear.positions_last(x_BxLxI).swapaxes(1, 2)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    found = linear.of_positions_last(x_BxLxI.swapaxes(1, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_first_factors_are_uniform_and_their_own(tiny_config):
    config = tiny_config(**LORA, **{"model.embed_dim": 64, "lora.targets": ("q_proj",)})
    params = ModelDef(config).init()
    q0, q1 = (params[f"blocks.{i}.attention.q_proj.adapter.down"] for i in (0, 1))
    assert q0.shape == (64, 3) and not np.array_equal(q0, q1)
    assert [p.rpartition(".")[2] for p in adapters(params)] == ["q_proj"] * 3
    # Uniform within 1 / 8: a standard deviation of 1 / (8 sqrt(3)).
    both = np.concatenate([q0, q1])
    assert np.abs(both).max() <= 1 / 8
    assert both.std() == pytest.approx(1 / (8 * 3**0.5), rel=0.06)
    # The backbone begins as without them.
    others = ModelDef(tiny_config(**{"model.embed_dim": 64})).init()
    for name, value in others.items():
        np.testing.assert_array_equal(value, params[name])
    numbers = sum(x.size for x in params.values())
    assert count_parameters(config).active == numbers


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora.rank": -1}, "lora.rank=-1 must be 0 or more"),
        ({"lora.rank": 2, "optimizer.train": "tables"}, "no adapter would train"),
        ({"lora.targets": ("q_proj", "wq")}, "lora.targets=q_proj,wq must be some of q_proj, k_pr"),
        ({"lora.alpha": 0.0}, "lora.alpha=0.0 must be more than 0"),
    ],
)
def test_keys_that_cannot_work(tiny_config, keys, message):
    with pytest.raises(InputError, match=re.escape(message)):
        tiny_config(**keys)


def test_what_it_begins_with(base, train_step, make_batch, tiny_config, tmp_path):
    with pytest.raises(InputError, match=r"lora.rank=3 keeps .* train.init_from"):
        check_first_start(tiny_config(**LORA))
    nothing = {"model.stem_layers": (0, 1, 2), "lora.targets": ("up_proj",)}
    with pytest.raises(InputError, match=r"lora.targets=up_proj: no layer has one of them"):
        check_first_start(tiny_config(**{**LORA, **nothing, "train.init_from": str(base)}))
    step, state = _begun(base, train_step)
    _save(tmp_path, step, state)
    # Its adapters are taken on, of the same shape alone, and never left behind in silence.
    again, begun = _begun(tmp_path, train_step)
    np.testing.assert_array_equal(_host(begun)[0]["norm.scale"], _host(state)[0]["norm.scale"])
    others = {"lora.rank": 0}, {"lora.rank": 4}, {"lora.targets": ("q_proj",)}, {"lora.alpha": 7.0}
    for keys in others:
        with pytest.raises(InputError, match=r"was trained with lora\."):
            _begun(tmp_path, train_step, **keys)
    config = dataclasses.replace(
        tiny_config(**SIZES, **LORA),
        train=dataclasses.replace(step.config.train, init_from=None, continue_from=str(base)),
    )
    with pytest.raises(InputError, match=r"lora.rank=0"):
        find_origin(config)
    assert isinstance(again, TrainStep)


@pytest.fixture(scope="module")
def tuned(base, train_step, make_batch, tmp_path_factory):
    """A run whose adapters matter."""
    folder = tmp_path_factory.mktemp("tuned")
    keys = {"optimizer.learning_rate": 0.05, "optimizer.warmup_steps": 0}
    step, state = _begun(base, train_step, **keys)
    state, _ = _steps(step, state, make_batch)
    _save(folder, step, state)
    return folder


# PEFT asks transformers by an old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.long
def test_peft_and_transformers_give_the_same_logits(base, tuned, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    run = load_run(tuned)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 20))
    ours, before = logits(run, tokens), logits(load_run(base), tokens)
    assert np.abs(ours - before).max() > 0.05
    flags = ["--no-tokenizer"]
    export.main([f"--workdir={base}", "--format=hf", f"--out={tmp_path / 'base'}", *flags])
    export.main([f"--workdir={tuned}", "--format=hf", f"--out={tmp_path / 'merged'}", *flags])
    adapter = [f"--workdir={tuned}", "--format=peft", f"--out={tmp_path / 'adapter'}"]
    export.main([*adapter, f"--base={tmp_path / 'base'}"])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")

    def load(name):
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / name, trust_remote_code=True, dtype=torch.float32
        ).eval()

    with_adapter = peft.PeftModel.from_pretrained(load("base"), str(tmp_path / "adapter")).eval()
    for model in (with_adapter, with_adapter.merge_and_unload(), load("merged")):
        with torch.no_grad():
            theirs = model(input_ids=torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)
    # Decoding reads the adapters, too.
    prompt = tokens[:1, :6]
    with torch.no_grad():
        found = load("merged").generate(
            torch.tensor(prompt), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
    assert greedy(run, prompt.tolist(), 8)[0] == found[0, 6:].tolist()


@pytest.mark.long
def test_names_reach_no_projection_of_another_memory(train_step, make_batch, tmp_path):
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    keys = {"per_layer.layers": "all", "per_layer.width": 8}
    step = train_step(**SIZES, **keys)
    save_run(tmp_path / "base", step, trained_state(step, make_batch))
    _save(tmp_path / "tuned", *_begun(tmp_path / "base", train_step, **keys))
    out = tmp_path / "adapter"
    export.main([f"--workdir={tmp_path / 'tuned'}", "--format=peft", f"--out={out}"])
    config = peft.LoraConfig.from_pretrained(out)
    reached = ["self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj", "per_layer.gate_proj"]
    found = [bool(check_target_module_exists(config, f"model.layers.1.{n}")) for n in reached]
    assert found == [True, True, True, False]


def test_exports_that_would_leave_something_out(base, tuned, train_step, make_batch, tmp_path):
    with pytest.raises(InputError, match=r"lora.rank=0 and has no adapters; use --format=hf"):
        export.main([f"--workdir={base}", "--format=peft", f"--out={tmp_path / 'x'}"])
    step, state = _begun(base, train_step, **{"optimizer.train": "all"})
    _save(tmp_path / "all", step, state)
    with pytest.raises(InputError, match=r"its tables moved, too, and PEFT's format"):
        export.main([f"--workdir={tmp_path / 'all'}", "--format=peft", f"--out={tmp_path / 'x'}"])
    with pytest.raises(InputError, match=r"optimizer.train=backbone: a patch has rows alone"):
        export.main([f"--workdir={tuned}", "--format=patch", f"--out={tmp_path / 'x'}"])
    assert not (tmp_path / "x").exists()


def test_rows_of_other_memories_that_moved_are_not_left_out_either(tiny_config, tmp_path):
    keys = {"optimizer.train": "all", "model.stem_layers": "none", "value.layers": (1,)}
    config = tiny_config(**{**SIZES, **LORA, **keys})
    saved: Any = SimpleNamespace(config=config, model=config.model, folder="run")
    with pytest.raises(InputError, match=r"its tables moved, too, and PEFT's format"):
        export_peft(saved, tmp_path / "x")
