"""Runs that continue another under other batches, texts and contexts, its optimizer state kept.

They continue what an earlier version made, whose configuration does not know the key.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from stem_jax import run
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.loading import load_run
from stem_jax.checkpoints.origin import begin_from, find_origin
from stem_jax.config import Config, MeshConfig
from stem_jax.config_file import config_from_json
from stem_jax.errors import InputError
from stem_jax.mesh import make_mesh
from stem_jax.tables.spec import logical
from stem_jax.train import main
from stem_jax.training.past_updates import PastUpdates
from stem_jax.training.run_data import open_run_data
from stem_jax.training.schedule import learning_rates, make_schedule
from stem_jax.training.state import abstract_state
from stem_jax.training.step import TrainStep
from tests import earlier
from tests.earlier import STEP
from tests.logical import logical_table
from tests.offloading import store_arrays

pytestmark = pytest.mark.little_effort

END, SAVED = STEP + 6, STEP + 3
# Another batch, mixture, context, order and learning rate.
STAGE = {
    "data__sources": f"{earlier.SHOWN}/text.jsonl=1,facts=2",
    "train__global_batch_size": 16,
    "train__micro_batches": 2,
    "train__seq_len": 64,
    "train__seed": 5,
    "train__steps": END,
    "train__sample_prompt": "",
    "optimizer__learning_rate": 0.003,
    "optimizer__schedule": "linear",
    "data__validation_fraction": 0,
    "eval__every": 0,
    "eval__baselines": "False",
    "checkpoint__every": 3,
}


def two_devices(config: MeshConfig):
    return make_mesh(config, jax.devices()[:2])


@pytest.fixture(scope="module", autouse=True)
def on_two_devices():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_mesh", two_devices)
        yield


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    return earlier.unpack("sentencepiece", tmp_path_factory.mktemp("kept"))


def flags_of(workdir: Path, origin: Path, **overrides) -> list[str]:
    stage = STAGE | {"train__continue_from": origin} | overrides
    return earlier.train_flags("sentencepiece", workdir, **stage)


@pytest.fixture(scope="module")
def continued(kept, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("continued") / "run"
    main(flags_of(workdir, kept))
    return workdir


def losses(workdir: Path) -> dict[int, float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["train/loss"] for r in map(json.loads, lines) if "train/loss" in r}


def config_of(workdir: Path) -> Config:
    return config_from_json((workdir / "config.json").read_text())


def restored(workdir: Path, step: int, config: Config, mesh):
    """A checkpoint's state as a resume has it."""
    programs = TrainStep(config, mesh)
    with Checkpointer(workdir, read_only=True) as checkpoints:
        return checkpoints.restore(step, abstract_state(programs.blueprint))


PLACES = [((1, 1, 1), None), ((2, 2, 2), None), ((2, 2, 2), 256), ((1, 1, 1), 128)]


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize(("shape", "resident"), PLACES)
def test_a_run_begins_with_every_bit_of_the_checkpoint(kept, shape, resident):
    there = config_of(kept)
    sizes = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    config = dataclasses.replace(
        there,
        mesh=dataclasses.replace(there.mesh, **sizes),
        tables=dataclasses.replace(there.tables, resident_rows=resident),
        train=dataclasses.replace(there.train, continue_from=str(kept)),
    )
    mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(shape))])
    origin = find_origin(config)
    state, stores = begin_from(origin, TrainStep(config, mesh))
    folder = kept / "checkpoints" / str(STEP)
    raw = ocp.StandardCheckpointer().restore(folder / "opt_state")
    found = jax.tree.leaves(state.opt_state)
    assert len(raw) == len(found) and int(raw["000"]) == int(found[0]) == STEP
    for key, leaf in zip(sorted(raw), found, strict=True):
        # Sorted: that version had the dimensions of a head in another order.
        before, now = (np.sort(np.asarray(a), axis=None) for a in (raw[key], leaf))
        np.testing.assert_array_equal(now, before, err_msg=key)
        assert key == "000" or np.any(now)
    stored = [store_arrays(store) for store in stores.values()]
    [table] = stored or [logical_table(state.tables["stem"])]
    read = ocp.PyTreeCheckpointer().restore
    fields = read(folder / "table_rows") | read(folder / "table_slots")
    assert fields.keys() == table.keys()
    for name, field in fields.items():
        np.testing.assert_array_equal(table[name], field, err_msg=name)
    # Some rows lag behind, and stay where they are: what they missed has its old rates.
    assert len(set(table["last_step"].tolist())) > 2
    counters = [int(x) for x in (state.step, state.updates, state.touched_rows["stem"])]
    assert counters == [STEP, STEP, origin.info.touched_rows["stem"]]


def test_a_run_goes_on_with_the_moments_and_its_text_begins_anew(kept, continued):
    """Step by step as by hand; without the moments, or the rates that were, it were another."""
    config = config_of(continued)
    mesh = two_devices(config.mesh)
    programs = TrainStep(config, mesh)
    origin = find_origin(config)
    # Not told where the text begins: batch 0 is the first.
    batches = open_run_data(config, continued, prepared=True).batches

    def by_hand(state, past):
        schedule, found = make_schedule(config, END + 1, past=past), {}
        for step in range(STEP, END):
            batch = programs.place(batches.batch(step - STEP))
            sizes = programs.reads.sizes_for(batch, jax.device_get(programs.demand(batch)))
            state, metrics = programs.update(state, batch, schedule, sizes=sizes)
            found[step + 1] = float(metrics["loss"])
        return found, state

    state, _ = begin_from(origin, programs)
    past = PastUpdates().and_stage(STEP, STEP, origin.info.config)
    found, last = by_hand(state, past)
    assert losses(continued) == found
    ended = restored(continued, END, config, mesh)
    for one, other in zip(jax.tree.leaves(last), jax.tree.leaves(ended), strict=True):
        np.testing.assert_array_equal(one, other)

    def zeros(tree):
        return jax.tree.map(lambda x: jax.device_put(np.zeros_like(x), x.sharding), tree)

    state, _ = begin_from(origin, programs)
    fresh = zeros(state.tables["stem"])
    table = dataclasses.replace(state.tables["stem"], mu=fresh.mu, nu=fresh.nu)
    for reset in ({"opt_state": zeros(state.opt_state)}, {"tables": {"stem": table}}):
        again, _ = begin_from(origin, programs)
        other, _ = by_hand(dataclasses.replace(again, **reset), past)
        assert abs(other[END] - found[END]) > 1e-3
    again, _ = begin_from(origin, programs)
    assert by_hand(again, PastUpdates())[0] != found


def test_the_next_checkpoint_knows_the_rates_of_both(kept, continued):
    config = config_of(continued)
    with Checkpointer(continued, read_only=True) as checkpoints:
        info = checkpoints.info(END)
    assert (info.step, info.updates, info.past.first_step) == (END, END, STEP)
    rates = learning_rates(info.config, END, info.past)
    np.testing.assert_array_equal(rates[:STEP], learning_rates(config_of(kept), STEP))
    np.testing.assert_array_equal(rates[STEP:], learning_rates(config, END)[STEP:])
    assert rates[STEP - 1] != learning_rates(config, END)[STEP - 1]


def test_killed_it_resumes_bit_for_bit(continued, tmp_path, capfd):
    """Without the run that it continues, from the checkpoint in the middle."""
    workdir = tmp_path / "run"
    shutil.copytree(continued, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(END))
    main(flags_of(workdir, tmp_path / "gone"))
    assert f"resuming from step {SAVED}\n" in capfd.readouterr().out
    assert losses(workdir) == losses(continued)
    config = config_of(continued)
    mesh = two_devices(config.mesh)
    one, other = (restored(folder, END, config, mesh) for folder in (workdir, continued))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.long
def test_with_rows_in_host_memory_it_is_the_same_run(kept, continued, tmp_path):
    offloaded = tmp_path / "offloaded"
    main(flags_of(offloaded, kept, tables__resident_rows=384))
    # Bits are compared where programs are compiled as users' are (test_offload): with little
    # effort, sums of the two programs round otherwise.
    ours, theirs = losses(offloaded), losses(continued)
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-6)
    config = config_of(continued)
    one, other = (
        restored(folder, END, config, two_devices(config.mesh)) for folder in (offloaded, continued)
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_of_a_third_run_the_past_is_that_of_both(continued):
    config = config_of(continued)
    train = dataclasses.replace(config.train, continue_from=str(continued), steps=END + 1)
    origin = find_origin(dataclasses.replace(config, train=train))
    assert [stage.updates for stage in origin.past.stages] == [STEP, END]
    assert (origin.step, origin.past.first_step) == (END, END)


def test_who_reads_a_checkpoint_brings_rows_up_to_date_by_the_rates_that_were(continued):
    """The rows of a loaded run are those that its next step reads."""
    config = config_of(continued)
    mesh = two_devices(config.mesh)
    state = restored(continued, END, config, mesh)
    with Checkpointer(continued, read_only=True) as checkpoints:
        past = checkpoints.info(END).past
    programs, found = (
        TrainStep(config, mesh),
        np.asarray(logical(load_run(continued).rows["stem"].rows)),
    )
    right, wrong = (
        programs.caught_up_rows(state, make_schedule(config, END + 1, past=p))["stem"]
        for p in (past, PastUpdates())
    )
    right, wrong = logical(np.asarray(right)), logical(np.asarray(wrong))
    np.testing.assert_allclose(found, right, rtol=0, atol=1e-7)
    assert np.max(np.abs(found - wrong)) > 1e-4


def test_what_it_takes_over_is_said(kept, tmp_path, capfd):
    config = config_of(kept)
    train = dataclasses.replace(config.train, continue_from=str(kept), steps=END + 10)
    rates = dataclasses.replace(config.optimizer, learning_rate=0.5, schedule="constant")
    changed = dataclasses.replace(config, train=train, optimizer=rates)
    line = find_origin(changed).describe(changed)
    assert line.startswith(f"continuing checkpoint {STEP} of {kept} with its optimizer state")
    assert f"was {learning_rates(config, STEP)[-1]:.3g}, that of the next is 0.5;" in line


REFUSED = {
    "shape": (
        {"model__ffn_dim": 24},
        r"train.continue_from=.* was trained with model.ffn_dim=20, this run has 24; "
        r"add --config.model.ffn_dim=20",
    ),
    "layers": ({"model__stem_layers": "0"}, r"with model.stem_layers=\(0, 2\), this run has"),
    "rows": ({"tables__pad_multiple": 512}, r"with tables.pad_multiple=32, this run has 512"),
    "betas": (
        {"optimizer__beta2": 0.99, "optimizer__weight_decay": 0.2},
        r"optimizer.beta2: 0.95 -> 0.99; optimizer.weight_decay: 0.1 -> 0.2\).*add "
        r"--config.optimizer.beta2=0.95 --config.optimizer.weight_decay=0.1, or begin with its "
        r"weights alone by train.init_from",
    ),
    "rule": ({"tables__optimizer": "lazy_adamw"}, r"tables.optimizer: 'deferred_adamw' -> 'lazy_"),
    "steps": ({"train__steps": STEP}, rf"train.steps={STEP} counts the {STEP} steps .* more than"),
    "both": ({"train__init_from": "x"}, r"train.init_from=x and train.continue_from=.*: a run beg"),
    "nothing": ({"train__continue_from": "nowhere"}, r"train.continue_from=nowhere has no check"),
    "tokenizer": (
        {"data__tokenizer": "bytes"},
        r"train.continue_from=.* was trained with tokenizer .*its rows would belong to other",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_continued_is_refused_by_name(name, kept, tmp_path):
    overrides, words = REFUSED[name]
    with pytest.raises(InputError, match=words):
        main(flags_of(tmp_path / "run", kept, **overrides))
    assert not (tmp_path / "run" / "checkpoints").exists()
