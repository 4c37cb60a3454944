"""Runs that begin with another run's checkpoint: what they take over, and what they refuse."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.loading import load_run
from stem_jax.checkpoints.origin import begin_from, find_origin
from stem_jax.data.sentencepiece_training import train_sentencepiece
from stem_jax.errors import InputError
from stem_jax.mesh import make_mesh
from stem_jax.model.transformer import reader_of
from stem_jax.tables.spec import logical
from stem_jax.train import main
from stem_jax.training.schedule import make_schedule
from stem_jax.training.step import TrainStep
from tests.children import train_flags
from tests.logical import logical_table
from tests.offloading import store_arrays

SMALL = {
    "model.vocab_size": 300,
    "model.embed_dim": 32,
    "model.num_layers": 1,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.ffn_dim": 48,
    "model.stem_layers": "0",
    "data.sources": "facts",
    "data.tokenizer": "bytes",
    "train.steps": 9,
    "train.global_batch_size": 8,
    "train.seq_len": 32,
    "train.sample_prompt": "",
    "optimizer.warmup_steps": 2,
    "eval.every": 0,
    "eval.max_batches": 4,
    "eval.baselines": "False",
    "checkpoint.every": 0,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("origin") / "run"
    main(train_flags("tiny", workdir, SMALL, {}))
    return workdir


def records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


PLACES = [((1, 1, 1), None), ((2, 2, 2), None), ((2, 2, 2), 256), ((1, 1, 1), 128)]


@pytest.mark.parametrize("resident", [None, 128])
def test_memories_that_it_has_not_begin_silently(trained, resident):
    """The model gives the origin's losses, and beside it learns what is new."""
    config = load_run(trained).config
    ngram = dataclasses.replace(
        config.ngram,
        layers=(0,),
        heads=1,
        keys_per_head=config.model.vocab_size,
        width=16,
        eos_id=1,
        resident_rows=resident,
    )
    per_layer = dataclasses.replace(config.per_layer, layers=(0,), width=8, resident_rows=resident)
    mesh, losses, states = make_mesh(config.mesh, jax.devices()[:1]), [], []
    init = dataclasses.replace(config.train, init_from=str(trained))
    for more in ({}, {"ngram": ngram, "per_layer": per_layer}):
        whole = dataclasses.replace(config, train=init, **more)
        origin, step = find_origin(whole), TrainStep(whole, mesh)
        assert ("begin anew" in origin.describe(whole)) == bool(more)
        state, stores = begin_from(origin, step)
        states.append(state)
        assert set(stores) == (set(more) if resident else set())
        if resident:
            continue
        tokens = np.random.default_rng(0).integers(
            0, config.model.vocab_size, (config.train.global_batch_size, config.train.seq_len)
        )
        places = np.broadcast_to(np.arange(config.train.seq_len), tokens.shape)
        arrays = {"tokens": tokens, "targets": tokens, "positions": places}
        batch = {name: array.astype(np.int32) for name, array in arrays.items()}
        batch |= {"segment_ids": np.ones_like(batch["tokens"]), "loss_mask": np.ones(tokens.shape)}
        schedule = make_schedule(whole, 10)
        total, _ = step.evaluate(state, step.place(batch), schedule)
        losses.append(float(total))
    old, new = states
    assert {reader_of(name) for name in new.params.keys() - old.params.keys()} == {
        "ngram",
        "per_layer",
    }
    for name, value in old.params.items():
        np.testing.assert_array_equal(new.params[name], value, err_msg=name)
    if not resident:
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
        assert np.any(np.asarray(new.tables["ngram"].rows))


@pytest.mark.parametrize("trains", ["tables", "backbone"])
def test_what_is_new_is_not_frozen(trained, trains):
    config = load_run(trained).config
    config = dataclasses.replace(
        config,
        per_layer=dataclasses.replace(config.per_layer, layers=(0,)),
        optimizer=dataclasses.replace(config.optimizer, train=trains),
        train=dataclasses.replace(config.train, init_from=str(trained)),
    )
    with pytest.raises(InputError, match=f"has no per_layer: .*optimizer.train={trains} keeps"):
        find_origin(config)


def test_optimizer_state_has_no_place_for_another_memory(trained):
    config = load_run(trained).config
    value = dataclasses.replace(config.value, layers=(0,))
    train = dataclasses.replace(config.train, continue_from=str(trained))
    with pytest.raises(InputError, match=r"continue_from=.* with value\.layers=\(\), .* \(0,\)"):
        find_origin(dataclasses.replace(config, value=value, train=train))


@pytest.mark.parametrize(("shape", "resident"), PLACES)
def test_parameters_and_rows_are_those_of_the_next_step(trained, shape, resident):
    with Checkpointer(trained, read_only=True) as checkpoints:
        config = checkpoints.info(9).config
    sizes = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    config = dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, **sizes),
        tables=dataclasses.replace(config.tables, resident_rows=resident),
        train=dataclasses.replace(config.train, init_from=str(trained)),
    )
    mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(shape))])
    state, stores = begin_from(find_origin(config), TrainStep(config, mesh))
    loaded = load_run(trained)
    for name, value in loaded.params.items():
        np.testing.assert_array_equal(state.params[name], value, err_msg=name)
    stored = [store_arrays(store) for store in stores.values()]
    [table] = stored or [logical_table(state.tables["stem"])]
    # Rows that lag behind in the checkpoint have caught up; nothing else is remembered.
    np.testing.assert_allclose(table["rows"], logical(loaded.rows["stem"].rows), rtol=0, atol=1e-7)
    assert not any(np.any(np.asarray(table[name])) for name in ("mu", "nu", "last_step"))
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(state.opt_state))
    assert [int(x) for x in (state.step, state.updates, state.touched_rows["stem"])] == [0, 0, 0]


def test_a_run_begins_where_the_other_ended(trained, tmp_path, capfd):
    origin = tmp_path / "origin"
    shutil.copytree(trained, origin)
    stage = {
        "train__init_from": origin,
        "train__seq_len": 64,
        "train__steps": 3,
        "model__rope_scaling": "yarn",
        "model__rope_factor": 2.0,
        "model__rope_original_len": 32,
        "optimizer__schedule_steps": 6,
    }
    flags = train_flags("tiny", tmp_path / "run", SMALL, stage)
    main(flags)
    assert f"beginning with checkpoint 9 of {origin}\n" in capfd.readouterr().out
    first = next(r for r in records(tmp_path / "run") if "train/loss" in r)
    last = [r for r in records(trained) if "train/loss" in r][-1]
    start = next(r for r in records(trained) if "train/loss" in r)
    assert first["step"] == 1
    # Nearer to where the other ended than to random parameters.
    assert first["train/loss"] - last["train/loss"] < 0.5 * (
        start["train/loss"] - last["train/loss"]
    )
    # A run that has checkpoints of its own needs the other no more.
    shutil.rmtree(origin)
    main([*flags, "--config.train.steps=5"])
    assert "resuming from step 3\n" in capfd.readouterr().out


def test_refusals_name_the_key_and_the_folder(trained, tmp_path):
    def start(**overrides):
        main(train_flags("tiny", tmp_path / "run", SMALL, overrides))

    with pytest.raises(
        InputError, match=r"ffn_dim=48, this run has 64; add --config.model.ffn_dim=48"
    ):
        start(train__init_from=trained, model__ffn_dim=64)
    with pytest.raises(InputError, match=r"train.init_from=.*nowhere has no checkpoints folder"):
        start(train__init_from=tmp_path / "nowhere")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_another_tokenizer_is_refused(trained, tmp_path):
    texts = [f"Document {n} of some text about nothing at all." for n in range(400)]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": line}) for line in texts))
    model = tmp_path / "model"
    train_sentencepiece(texts, model, 290)
    overrides = {
        "train__init_from": trained,
        "data__sources": text,
        "data__tokenizer": "sentencepiece",
        "data__tokenizer_path": model,
    }
    with pytest.raises(InputError, match=r"its rows would belong to other tokens"):
        main(train_flags("tiny", tmp_path / "run", SMALL, overrides))
