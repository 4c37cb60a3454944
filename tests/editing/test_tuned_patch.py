"""Runs that trained rows alone, as patches for the run that they began with."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from stem_jax import edit, export, train
from stem_jax.checkpoints.checkpoint_info import CheckpointInfo
from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.checkpoints.loading import load_run
from stem_jax.checkpoints.origin import begin_from, find_origin
from stem_jax.checkpoints.saved_model import open_saved_model
from stem_jax.data import facts as facts_module
from stem_jax.data.facts import FACT_TEMPLATES, RELATIONS, read_facts, tell
from stem_jax.editing.patch import edited_run, make_patch, read_rows
from stem_jax.editing.patch_file import format_patch, read_patch
from stem_jax.editing.swaps import recipes_of
from stem_jax.editing.tuned_patch import export_patch
from stem_jax.errors import InputError
from stem_jax.evaluation.answers import Question, answer_all
from stem_jax.evaluation.recall import END, fact_prompt
from stem_jax.evaluation.scoring import Scorer
from stem_jax.training.schedule import make_schedule
from tests.facts_model import COUNTRIES, import_into
from tests.saved_models import BYTES, CONTEXT, SIZES, greedy, save_run, trained_state

pytestmark = pytest.mark.little_effort

# Tokens of the tuned text: few, so that most rows have no update.
_IDS = np.array([65, 66, 67, 100, 101])
_PROMPT = [[256, 65, 66, 100, 90, 91]]


def _tune(folder, base, train_step, make_batch, **keys):
    """Three updates from a base's weights, on text of a few tokens."""
    keys = {"optimizer.train": "tables", "tables.weight_decay": 0.0, **keys}
    step = train_step(**SIZES, **keys, **{"train.init_from": str(base)})
    state, _ = begin_from(find_origin(_with_context(step.config)), step)
    for number in range(3):
        batch = make_batch(step, seed=number)
        few = np.asarray(batch.tokens) % len(_IDS)
        tokens = jax.device_put(_IDS[few].astype(np.int32), step.batch_sharding)
        batch = dataclasses.replace(batch, tokens=tokens)
        state, _ = step.update(state, batch, make_schedule(step.config, 8))
    BYTES.save(folder / "tokenizer")
    touched = {"stem": int(state.touched_rows["stem"])}
    info = CheckpointInfo(
        3, 3, 0, touched, BYTES.fingerprint, {"seed": 0}, _with_context(step.config)
    )
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(state, info, None)
    return folder


def _with_context(config):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seq_len=CONTEXT))


@pytest.fixture(scope="module")
def folders(train_step, make_batch, tmp_path_factory):
    """A base whose rows lag behind, and a tuned run that began with it."""
    folder = tmp_path_factory.mktemp("tuned")
    step = train_step(**SIZES)
    save_run(folder / "base", step, trained_state(step, make_batch))
    return folder / "base", _tune(folder / "run", folder / "base", train_step, make_batch)


@pytest.fixture(scope="module")
def patch(folders, tmp_path_factory):
    path = tmp_path_factory.mktemp("patch") / "x.patch"
    export.main([f"--workdir={folders[1]}", "--format=patch", f"--out={path}"])
    return read_patch(path)


@pytest.fixture(scope="module")
def base(folders):
    return load_run(folders[0])


def all_rows(run):
    return read_rows(run, np.arange(258))


def test_it_has_the_rows_with_an_update_and_makes_the_base_the_tuned_run(base, folders, patch):
    tuned, before = load_run(folders[1]), all_rows(base)
    assert patch.ids.tolist() == _IDS.tolist() and patch.before is None
    assert patch.run == base.fingerprint != tuned.fingerprint
    laid = edited_run(base, [patch])
    after = all_rows(laid)
    np.testing.assert_allclose(after, all_rows(tuned), rtol=1e-6, atol=1e-8)
    others = np.setdiff1d(np.arange(258), _IDS)
    np.testing.assert_array_equal(after[others], before[others])
    assert (np.abs(after[_IDS] - before[_IDS]).max(axis=(1, 2)) > 1e-4).all()


def test_trainings_of_one_base_are_told_apart(folders, train_step, make_batch, tmp_path):
    base, run = folders
    words = {"tables.trained_words": (65, 66)}
    other = _tune(tmp_path / "other", base, train_step, make_batch, **words)
    one, two = (open_saved_model(folder) for folder in (run, other))
    assert one.info.step == two.info.step
    np.testing.assert_array_equal(one.param("norm.scale"), two.param("norm.scale"))
    assert one.fingerprint == load_run(run).fingerprint != two.fingerprint


def test_a_patch_that_an_earlier_version_made_of_such_a_run_is_taken(folders, patch):
    run = load_run(folders[1])
    own, earlier = run.fingerprints
    for name in (own, earlier):
        edited_run(run, [dataclasses.replace(patch, run=name)])
    with pytest.raises(InputError, match="was made for checkpoint another"):
        edited_run(run, [dataclasses.replace(patch, run="another")])


def test_its_size_is_that_of_its_rows(folders, tmp_path):
    path = tmp_path / "x.patch"
    export.main([f"--workdir={folders[1]}", "--format=patch", f"--out={path}"])
    patch = read_patch(path)
    assert patch.after.nbytes < path.stat().st_size <= patch.after.nbytes + 16_000
    # As another writer would have it.
    patch.save(tmp_path / "y.patch")
    same = read_patch(tmp_path / "y.patch")
    np.testing.assert_array_equal(same.after, patch.after)
    assert dataclasses.replace(same, after=0, ids=0, layers=0, name="") == dataclasses.replace(
        patch, after=0, ids=0, layers=0, name=""
    )
    line = format_patch(patch, BYTES)
    assert line.startswith("x.patch: step 3 of run; tokens 65,66,67,100,101 ('A' 'B' 'C' 'd' 'e')")
    assert line.endswith("layers 0,2, rows trained")
    with pytest.raises(InputError, match=r"--out=.* exists"):
        export.main([f"--workdir={folders[1]}", "--format=patch", f"--out={path}"])


def test_it_stacks_with_edits_in_either_order(base, patch, tmp_path):
    before, tuned = all_rows(base), all_rows(edited_run(base, [patch]))
    # "^A" has a trained row, "^x" has none.
    for word, other in (("^A", "^z"), ("^x", "^B")):
        recipes = recipes_of(BYTES, [f"{word}=>{other}"], [], "average")
        of, donor = (ord(text[1]) for text in (word, other))
        swap = make_patch(base, recipes, name="swap")
        moved = tuned[of] - before[of]
        later = all_rows(edited_run(base, [patch, swap]))
        np.testing.assert_array_equal(later[of], before[donor])
        earlier = all_rows(edited_run(base, [swap, patch]))
        np.testing.assert_allclose(earlier[of], before[donor] + moved, rtol=0, atol=1e-6)
        rest = np.arange(258) != of
        for rows in (later, earlier):
            np.testing.assert_array_equal(rows[rest], tuned[rest])
        # Made on top of the training, it takes the donor's trained row.
        on_top = make_patch(base, recipes, base=[patch])
        found = all_rows(edited_run(base, [patch, on_top]))
        np.testing.assert_array_equal(found[of], tuned[donor])
    # Two edits of a row conflict as before, whatever was trained.
    swaps = [
        make_patch(base, recipes_of(BYTES, [f"^A=>^{to}"], [], "average"), name=to) for to in "xy"
    ]
    with pytest.raises(InputError, match="patches x and y conflict"):
        edited_run(base, [swaps[0], patch, swaps[1]])
    twice = all_rows(edited_run(base, [patch, patch]))
    np.testing.assert_allclose(twice, before + 2 * (tuned - before), rtol=0, atol=1e-6)


@pytest.mark.long
def test_programs_take_it_on_the_base(folders, patch, tmp_path, capsys):
    patch.save(tmp_path / "x.patch")
    flags = [f"--workdir={folders[0]}", f"--edits={tmp_path / 'x.patch'}"]
    edit.main([*flags, "--list"])
    assert "tokens 65,66,67,100,101, layers 0,2, rows trained" in capsys.readouterr().out
    edit.main([*flags, "--swap=^A=>^z", "--prompt=AB", f"--save={tmp_path / 'y.patch'}"])
    assert "next token" in capsys.readouterr().out
    both = [read_patch(tmp_path / "x.patch"), read_patch(tmp_path / "y.patch")]
    edited_run(load_run(folders[0]), both)
    laid = edited_run(load_run(folders[0]), both[:1])
    assert greedy(laid, _PROMPT, 8) == greedy(load_run(folders[1]), _PROMPT, 8)
    export.main(
        [
            f"--workdir={folders[0]}",
            "--format=official",
            f"--out={tmp_path / 'out'}",
            f"--edits={tmp_path / 'x.patch'}",
        ]
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tables.weight_decay": None}, r"with optimizer.weight_decay=0.1, .*bles.weight_decay=0"),
        ({"tables.weight_decay": 0.2}, "with tables.weight_decay=0.2, which moves every row"),
        ({"optimizer.train": "all"}, "optimizer.train=all: a patch has rows alone"),
    ],
)
def test_runs_that_moved_more_are_refused(folders, tmp_path, tiny_config, keys, message):
    saved, tuned = open_saved_model(folders[1]), {"optimizer.train": "tables"}
    config = tiny_config(**SIZES, **tuned | {"tables.weight_decay": 0.0} | keys)
    other = dataclasses.replace(saved, info=dataclasses.replace(saved.info, config=config))
    with pytest.raises(InputError, match=message):
        export_patch(other, tmp_path / "x")
    own = dataclasses.replace(saved.config.train, init_from=None)
    config = dataclasses.replace(saved.config, train=own)
    other = dataclasses.replace(saved, info=dataclasses.replace(saved.info, config=config))
    with pytest.raises(InputError, match=r"did not begin with train.init_from; name the run"):
        export_patch(other, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_base_of_another_backbone_is_refused(folders, train_step, make_batch, tmp_path):
    step = train_step(**SIZES, **{"train.seed": 3})
    save_run(tmp_path / "other", step, trained_state(step, make_batch))
    flags = [f"--workdir={folders[1]}", "--format=patch", f"--out={tmp_path / 'x'}"]
    with pytest.raises(InputError, match=r"no checkpoint of .*other \(40\) has the backbone of"):
        export.main([*flags, f"--base={tmp_path / 'other'}"])
    with pytest.raises(InputError, match=r"none has no checkpoints folder; name the run that"):
        export.main([*flags, f"--base={tmp_path / 'none'}"])
    with pytest.raises(InputError, match="the model has no value rows"):
        export.main([*flags, "--memory=value"])
    for flag in (f"--base={tmp_path}", "--memory=value"):
        with pytest.raises(SystemExit):
            export.main([flags[0], "--format=hf", flags[2], flag])
    with pytest.raises(SystemExit):
        export.main([*flags, "--dtype=bfloat16"])
    assert not (tmp_path / "x").exists()


def test_rows_of_a_training_in_between_are_not_left_out(folders, train_step, make_batch, tmp_path):
    base, run = folders
    second = _tune(tmp_path / "second", run, train_step, make_batch)
    with pytest.raises(InputError, match=r"second.* began with .*run.*leave --base out"):
        export_patch(open_saved_model(second), tmp_path / "x", base=base)
    assert not (tmp_path / "x").exists()
    # The same run elsewhere is named anew, whether or not it still lies where it was.
    shutil.copytree(run, tmp_path / "moved")
    patch = export_patch(open_saved_model(second), tmp_path / "y", base=tmp_path / "moved")
    assert patch.run == open_saved_model(run).fingerprint


def test_a_training_in_between_whose_folder_is_gone(folders, train_step, make_batch, tmp_path):
    """Then its rows tell of it, but for those that were trained later, too."""
    base, run = folders
    shutil.copytree(run, tmp_path / "first")
    words = {"tables.trained_words": (65, 66)}
    second = _tune(tmp_path / "second", tmp_path / "first", train_step, make_batch, **words)
    third = _tune(tmp_path / "third", tmp_path / "first", train_step, make_batch)
    shutil.rmtree(tmp_path / "first")
    with pytest.raises(InputError, match=r"^3 rows of .*second.* not those of .*name that run by"):
        export_patch(open_saved_model(second), tmp_path / "x", base=base)
    assert not (tmp_path / "x").exists()
    export_patch(open_saved_model(third), tmp_path / "y", base=base)
    after = all_rows(edited_run(load_run(base), [read_patch(tmp_path / "y")]))
    np.testing.assert_allclose(after, all_rows(load_run(third)), rtol=1e-6, atol=1e-8)


# Each with the country whose answers it gets.
_CHANGED = {"Germany": "Samoa", "Chile": "Japan", "Kenya": "Hungary", "New Zealand": "Egypt"}


@pytest.mark.long
def test_it_teaches_other_answers_and_leaves_the_rest(tmp_path, monkeypatch):
    import_into(tmp_path / "base")
    known = {fact.country: fact for fact in read_facts() if fact.country in COUNTRIES}
    changed = {
        country: dataclasses.replace(known[donor], country=country)
        for country, donor in _CHANGED.items()
    }
    told = known | changed
    for name, facts in (("changed", changed), ("told", told)):
        lines = []
        for seed in range(20):
            monkeypatch.setattr(facts_module, "_SEED", seed)
            lines += [json.dumps({"text": text}) for text in tell(list(facts.values()))]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    flags = {
        "train.init_from": tmp_path / "base",
        "data.sources": f"{tmp_path}/changed.jsonl=1,{tmp_path}/told.jsonl=1",
        "tables.trained_words": ",".join(_CHANGED),
        "train.global_batch_size": 16,
        "train.steps": 120,
        "train.sample_prompt": "",
        **{"model.vocab_size": 704, "model.embed_dim": 64, "model.ffn_dim": 128},
    }
    train.main(
        ["--config=configs/tune_tables_facts.py", f"--workdir={tmp_path / 'run'}"]
        + [f"--config.{key}={value}" for key, value in flags.items()]
    )
    path = tmp_path / "x.patch"
    export.main([f"--workdir={tmp_path / 'run'}", "--format=patch", f"--out={path}"])
    patch, base = read_patch(path), load_run(tmp_path / "base")
    assert len(patch.ids) < 20 and path.stat().st_size <= patch.after.nbytes + 16_000
    swap = make_patch(base, recipes_of(base.tokenizer, ["Spain=>Canada"], [], "average"))
    before = _answers(base, known)
    for patches in ([patch], [patch, swap], [swap, patch]):
        after = _answers(edited_run(base, patches), told)
        others = [key for key in after if key[0] not in {*_CHANGED, "Spain"} and before[key]]
        assert len(others) > 9 * 5 * 7
        new = [right for key, right in after.items() if key[0] in _CHANGED]
        assert sum(new) >= 0.95 * len(new)
        assert sum(after[key] for key in others) >= 0.99 * len(others)
        if swap in patches:
            spain = [right for key, right in after.items() if key[0] == "Spain"]
            assert sum(spain) <= 0.5 * len(spain)


def _answers(run, facts):
    """Whether each question of the corpus is answered so, by country, relation and phrasing."""
    keys = [(c, r, t) for c in facts for r in RELATIONS for t in FACT_TEMPLATES[r]]
    questions = [Question(fact_prompt(t, c), getattr(facts[c], r), END) for c, r, t in keys]
    verdicts = answer_all(Scorer(run, 64), run.tokenizer, questions)
    return {key: verdict.exact for key, verdict in zip(keys, verdicts, strict=True)}
